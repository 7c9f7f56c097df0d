// The one file that is compiled for each NORM. Everything else is compiled once, and linked with each of these.
#include "trainer/norm.h"

#ifndef NORM
#error "compile with -DNORM=LNS, or another name of enum Norm"
#endif

const Norm compiled_norm = Norm::NORM;  // a mis-spelled NORM stops the compiler here
