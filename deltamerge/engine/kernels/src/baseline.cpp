// Compiles the loops for any processor of the architecture.
#define DELTAMERGE_LEVEL 0
#define DELTAMERGE_TABLE kBaseline
#define DELTAMERGE_NAME "baseline"
#include "vector/headers.h"
#include "vector/table.h"
