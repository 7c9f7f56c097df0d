// What the tests of train_gpt.cu are compiled with: the trainer itself, without its main.
#pragma once
#define TESTING
#include "../train_gpt.cu"
