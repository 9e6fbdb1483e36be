/*
 * io_vector.h: struct iovec, and nothing else.
 *
 * Why it exists: several of our headers need struct iovec, and no module of the C library owns it. Swift then takes the
 * first importer for its owner, which differs from build to build. Here it has one owner: CIOVector.
 */
#ifndef IO_VECTOR_H
#define IO_VECTOR_H
/* The smallest header that defines it: <sys/uio.h> would make this module the owner of unrelated types too. */
#if __has_include(<bits/types/struct_iovec.h>)
#include <bits/types/struct_iovec.h>
#else
#include <sys/uio.h>
#endif
#endif
