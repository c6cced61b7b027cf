/* What programs of this folder expect of a call, and say where it is not so. */
#ifndef CHECK_H
#define CHECK_H

#include "nybl.h"

#include <stdio.h>

static int failures = 0;

static void expect(nybl_status got, nybl_status want, const char *call, int line)
{
    if (got != want) {
        char text[256];
        nybl_last_error(text, sizeof text);
        fprintf(stderr, "line %d: %s: %s, not %s (%s)\n", line, call, nybl_status_name(got),
                nybl_status_name(want), text);
        failures++;
    }
}

#define EXPECT(call, status) expect(call, status, #call, __LINE__)
#define CHECK(condition)                                                                             \
    do {                                                                                             \
        if (!(condition)) {                                                                          \
            fprintf(stderr, "line %d: not so: %s\n", __LINE__, #condition);                          \
            failures++;                                                                              \
        }                                                                                            \
    } while (0)

#endif
