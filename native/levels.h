// The sixteen levels that 4 bits choose from; src/qiusuo/kernels/low_bit.py says where from.
#pragma once
#include <cstdint>

constexpr int8_t LEVELS[16] = {-127, -101, -80, -62, -47, -34, -21, -9,
                               2,    13,   25,  37,  50,  65,  83,  108};
