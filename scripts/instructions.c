// Counts what a program executes under qemu-user, function by function: scripts/instructions.py compiles and loads it.
//
// A count repeats where a time does not, so it shows a regression on a busy machine too. qemu cuts a program into blocks that are
// executed from the first instruction to the last. Each gets a counter when it is translated, and at the end one line
//
//     nybl: <instructions of the block> <times it was executed> <function it lies in, or ?>
//
// goes to qemu's log for each; a block that was translated twice has two. An instruction that ends a block early by an
// exception has the rest of its block counted too.
//
// qemu-plugin.h is not packaged everywhere, so what is needed of it is declared here (API:
// <https://www.qemu.org/docs/master/devel/tcg-plugins.html>). These functions are alike in versions 1 to 6 of the
// API; which of them a qemu takes is for who compiles this to find out.

#include <inttypes.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

#ifndef PLUGIN_API
#error "-DPLUGIN_API=N: the version of the plugin API that this qemu takes, 1 for qemu 7"
#endif
#define EXPORT __attribute__((visibility("default")))

struct qemu_plugin_tb;
struct qemu_plugin_insn;
void qemu_plugin_register_vcpu_tb_trans_cb(uint64_t id, void (*callback)(uint64_t id, struct qemu_plugin_tb *tb));
void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb *tb, void (*callback)(unsigned cpu, void *data),
                                          int registers, void *data);
void qemu_plugin_register_atexit_cb(uint64_t id, void (*callback)(uint64_t id, void *data), void *data);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *tb);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *tb, size_t index);
const char *qemu_plugin_insn_symbol(const struct qemu_plugin_insn *insn);
void qemu_plugin_outs(const char *text);
// That the callback reads and writes no registers.
enum { NO_REGISTERS = 0 };

EXPORT int qemu_plugin_version = PLUGIN_API;

struct block {
    struct block *next;
    // Belongs to qemu, which keeps it.
    const char *function;
    size_t instructions;
    // Threads of the program share blocks.
    atomic_uint_least64_t times;
};

// The newest. qemu translates one block at a time, under a lock.
static struct block *blocks;

static void executed(unsigned cpu, void *data) {
    (void)cpu;
    atomic_fetch_add_explicit(&((struct block *)data)->times, 1, memory_order_relaxed);
}

static void translated(uint64_t id, struct qemu_plugin_tb *tb) {
    (void)id;
    struct block *block = calloc(1, sizeof *block);
    if (block == NULL) {
        // A count that lacks something must not look like one.
        fputs("instructions.c: out of memory\n", stderr);
        abort();
    }
    block->next = blocks;
    block->function = qemu_plugin_insn_symbol(qemu_plugin_tb_get_insn(tb, 0));
    block->instructions = qemu_plugin_tb_n_insns(tb);
    blocks = block;
    qemu_plugin_register_vcpu_tb_exec_cb(tb, executed, NO_REGISTERS, block);
}

static void ended(uint64_t id, void *data) {
    (void)id, (void)data;
    for (const struct block *block = blocks; block != NULL; block = block->next) {
        const char *function = block->function != NULL && *block->function != 0 ? block->function : "?";
        // Of a name longer than that the beginning will do.
        char line[8192];
        if (snprintf(line, sizeof line, "nybl: %zu %" PRIu64 " %.8000s\n", block->instructions,
                     (uint64_t)atomic_load_explicit(&block->times, memory_order_relaxed), function) > 0) {
            qemu_plugin_outs(line);
        }
    }
}

EXPORT int qemu_plugin_install(uint64_t id, const void *info, int argc, char **argv) {
    (void)info, (void)argc, (void)argv;
    qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
    qemu_plugin_register_atexit_cb(id, ended, NULL);
    return 0;
}
