#pragma once
#include "native.h"

void unpack_row(const Weight &w, int row, float *out);   // one row as float32
const Kernels *kernels_named(const char *isa);           // the best that is allowed and loaded; null: none
void draw(Draw &d);                                      // one token
