"""What the compiled loop can do with a piece of a tensor: the numbers of its operations.

This is the one table of them: setup.py makes engine/kernels/src/codes.h of it, for the compiled loop. An assignment
here is a name and a plain number.
"""

# Elements read and written at once: in bfloat16 small enough for a core's cache beside the registers.
PIECE = 1 << 16

# Operands from this number on are bfloat16 or float32 as read from a source: operand - DIRECT is which.
DIRECT = 1 << 32

# Values beyond the end of a list of magnitudes that the loop may write.
SLACK = 16

# Stored dtypes, as the loop numbers them.
DTYPES = {"BF16": 0, "F32": 1, "F16": 2}

# What an operation does; its fields are (code, to, a, b, c, d), registers unless told otherwise.
LOAD = 0  # to = source a
SUBTRACT = 1  # to = a - b, each direct or not
DROP = 2  # to = (a - b) / scalar where the word of the entry is below c · 2**16 + d, else 0; a, b as in SUBTRACT
DIVIDE = 3  # to = a / scalar; of a list, as many as there are places b (-1: a whole chunk)
KEEP = 4  # to = the model where a is above the threshold b, and the first c of its equals; d: their ranks (-1: all)
ADD = 5  # to = base a + scaled weighted sum of the models (a = -1: no base), each direct or not; b: places, or -1
AGREE = 6  # the same of the entries that agree on a sign, of registers; c: normalize
STORE = 7  # the output = a
HIGH = 8  # counts from d on: of a's high bits
LOW = 9  # of its low bits inside bin b
EQUAL = 10  # of equals of b, per block
DOTS = 11  # row c of sums: per block the dot product of a and b
DRAW = 12  # places to = kept by gaps, with table a
DIFFER_AT = 13  # to = source a - source b at places c
ALIGN = 14  # places to = union of the lists of the models; a: register of the first of their rows
BASE_AT = 15  # to = source a at places b
PATCH = 16  # the output = source a, but register b at places c; register to is free
LIST = 17  # row c of listed: per block what a has from b to d, after how many are above and inside
SAMPLE = 18  # row c of listed: the magnitudes of a in a run of b entries of each block
SCATTER = 19  # to = a at places b, else 0; b = -1: no places
RANK = 20  # to = a kept by rank in rows of b (0: a block is a row), c: divided; lists: (length, limits, ratios) of rows
VARIANCE = 21  # to = the variance of the models
ELECT = 22  # to = base a + the weighted mean of the models that have the elected sign
CLEAR = 23  # to = a where b is 0 bits, else 0
NONZERO = 24  # count at d: of a's entries that are not 0
NORM = 25  # row c of sums: per block the largest magnitude (b = 0) or the sum of them (1)
ROWS = 26  # to = a where b is among the c largest of its row of d
# to = a by a table at c, rows of b; d: ÷ that of its row (0) or column (1), its magnitude × that (2); lists: its places
SPREAD = 27
COLUMNS = 28  # to = a, but in the columns of lists b (-1: 0); rows of c
