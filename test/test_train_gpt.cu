// The kernels and the whole model in one program: the trainer, which both are compiled with, is what takes long.
#include "test_kernels.cu"
#include "test_model.cu"
