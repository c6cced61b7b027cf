#include <nybl.h>
