// The table of the loops of one processor level; includes every loop, which is compiled for it.
#pragma once

#include "coded.h"
#include "floats.h"
#include "hash.h"
#include "masks.h"
#include "merge.h"
#include "rank.h"
#include "scaled.h"
#include "select.h"
#include "sums.h"
#include "tabled.h"
#include "trellis.h"
#include "turned.h"

namespace deltamerge {

extern const Loops DELTAMERGE_TABLE;
const Loops DELTAMERGE_TABLE = {
    DELTAMERGE_NAME,
    widen,
    narrow_all,
    subtract,
    divide,
    drop,
    add,
    agree,
    elect,
    variance,
    keep_from,
    keep_first_equals,
    clear_where,
    count_high,
    count_low,
    count_equal,
    count_nonzero,
    list_between,
    magnitudes,
    keep_by_rank,
    keep_largest_of_rows,
    divide_each,
    score,
    dot,
    sum_abs,
    largest,
    draw,
    differ_at,
    widen_at,
    narrow_at,
    align,
    hash,
    scale_row,
    turn_pairs,
    turn_words,
    code_values,
    trellis,
    ordered_product,
};

}  // namespace deltamerge
