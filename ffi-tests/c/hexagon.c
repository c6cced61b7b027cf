/* The DSP's part of the test: takes buffers from standard input, runs the block in each as a host's call would,
 * and writes them back. Linux's system calls and no C library, because none is needed to build this. */
#include "kernel_abi.h"

int nybl_hexagon_open(const char *uri, uint64_t *handle);
int nybl_hexagon_close(uint64_t handle);
int nybl_hexagon_matmul(uint64_t handle, unsigned char *buffer, int length, uint64_t block);

enum { READ = 63, WRITE = 64, EXIT_GROUP = 94, MPROTECT = 226 };
enum { PAGE = 1 << 16, MOST = 1 << 22 };

struct request {
    uint32_t length, block;
    /* 1 where the buffer shall start after an unmapped page instead of ending before one. */
    uint32_t left;
    uint32_t nothing;
};

/* With a page on each side that cannot be touched. */
static unsigned char memory[PAGE + MOST + PAGE] __attribute__((aligned(PAGE)));

/* What the compiler may call. */
void *memcpy(void *to, const void *from, size_t n) {
    for (size_t i = 0; i < n; i++)
        ((volatile char *)to)[i] = ((const char *)from)[i];
    return to;
}

void *memset(void *to, int value, size_t n) {
    for (size_t i = 0; i < n; i++)
        ((volatile char *)to)[i] = (char)value;
    return to;
}

/* Calls nybl_hexagon_matmul with known values in the registers that a function must give back, r16 to r27 and the
 * stack pointer, and leaves in `clobbered` the bits that came back different. */
int guarded_matmul(uint64_t handle, unsigned char *buffer, int length, uint64_t block);
uint32_t clobbered, stack_before;
#define PAIR(at, pair) "memd(r29+#" #at ") = r" #pair "\n"
#define BACK(at, pair) "r" #pair " = memd(r29+#" #at ")\n"
#define SET(reg) "r" #reg " = ##0xa5a500" #reg "\n"
#define CHECK(reg) "r2 = ##0xa5a500" #reg "\nr2 = xor(r2, r" #reg ")\nr1 = or(r1, r2)\n"
#define EACH(DO) DO(16) DO(17) DO(18) DO(19) DO(20) DO(21) DO(22) DO(23) DO(24) DO(25) DO(26) DO(27)
__asm__(".text\n.p2align 4\n.globl guarded_matmul\n.type guarded_matmul,@function\nguarded_matmul:\n"
        "allocframe(#48)\n" PAIR(0, 17:16) PAIR(8, 19:18) PAIR(16, 21:20) PAIR(24, 23:22) PAIR(32, 25:24) PAIR(40, 27:26)
        "memw(##stack_before) = r29\n" EACH(SET)
        "call nybl_hexagon_matmul\n"
        "r1 = memw(##stack_before)\nr2 = r29\nr29 = r1\nr1 = xor(r1, r2)\n" EACH(CHECK)
        "memw(##clobbered) = r1\n"
        BACK(0, 17:16) BACK(8, 19:18) BACK(16, 21:20) BACK(24, 23:22) BACK(32, 25:24) BACK(40, 27:26)
        "dealloc_return\n");

static long call(long number, long a, long b, long c) {
    register long r6 __asm__("r6") = number;
    register long r0 __asm__("r0") = a;
    register long r1 __asm__("r1") = b;
    register long r2 __asm__("r2") = c;
    __asm__ volatile("trap0(#1)" : "+r"(r0) : "r"(r6), "r"(r1), "r"(r2) : "memory");
    return r0;
}

static void leave(int code) {
    for (;;)
        call(EXIT_GROUP, code, 0, 0);
}

/* All bytes, or the end of the program where there are no more. */
static void transfer(long number, int file, void *bytes, uint32_t length) {
    for (uint32_t done = 0; done < length;) {
        long n = call(number, file, (long)((char *)bytes + done), (long)(length - done));
        if (n <= 0)
            leave(n == 0 && number == READ && done == 0 ? 0 : 2);
        done += (uint32_t)n;
    }
}

void _start(void) {
    uint64_t handle = 0;
    if (call(MPROTECT, (long)memory, PAGE, 0) || call(MPROTECT, (long)(memory + PAGE + MOST), PAGE, 0) ||
        nybl_hexagon_open("", &handle))
        leave(3);
    for (;;) {
        struct request request;
        transfer(READ, 0, &request, sizeof request);
        if (request.length > MOST)
            leave(4);
        unsigned char *buffer = memory + PAGE + (request.left ? 0 : MOST - request.length);
        transfer(READ, 0, buffer, request.length);
        int32_t code = guarded_matmul(handle, buffer, (int)request.length, request.block);
        if (clobbered)
            code = 100;
        transfer(WRITE, 1, &code, sizeof code);
        transfer(WRITE, 1, buffer, request.length);
    }
}
