// Which variant of normalization a program is: all that -DNORM=LNS decides. What each one does: lns_layers.cuh.
#pragma once

// make takes the names from this line
enum class Norm { PRE, LNS, POST, DEEPNORM, MIX, PERI, LNS_INIT, RES_SQRT, PRORES, KEEL, REORDERED };

extern const Norm compiled_norm;
