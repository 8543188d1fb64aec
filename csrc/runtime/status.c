// SPDX-License-Identifier: Apache-2.0
#include "runtime/status.h"

#include <stdarg.h>
#include <stdio.h>

cmb_status cmb_fail(cmb_error *error, cmb_status status, const char *format, ...) {
    if (error) {
        va_list arguments;
        va_start(arguments, format);
        error->status = status;
        vsnprintf(error->message, sizeof error->message, format, arguments);
        va_end(arguments);
    }
    return status;
}
