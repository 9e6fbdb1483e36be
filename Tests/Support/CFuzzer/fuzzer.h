/*
 * fuzzer.h: the door into libFuzzer, which the compiler links with -sanitize=fuzzer, and into AddressSanitizer.
 */
#ifndef FUZZER_H
#define FUZZER_H

#include <stddef.h>
#include <stdint.h>

/* Runs libFuzzer with the process's arguments; `test` is called with each input, and returns 0. */
int LLVMFuzzerRunDriver(int *count, char ***arguments, int (*test)(const uint8_t *data, size_t size));

#endif
