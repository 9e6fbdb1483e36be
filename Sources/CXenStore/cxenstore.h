/*
 * cxenstore.h: xenstore's library, and the words of its nodes. Nothing of its own.
 */
#ifndef CXENSTORE_H
#define CXENSTORE_H

#include <xenstore.h>
#include <xenstore_lib.h>
#include <xen/io/protocols.h>

#endif
