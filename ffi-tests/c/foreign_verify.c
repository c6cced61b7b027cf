/* A runtime of its own (a Markov chain for a model, another for the drafter) speculates with nothing of
 * nybl but nybl_verify(), and counts whether its text is still distributed as its model says.
 *
 *   cc foreign_verify.c -lnybl -lm && ./a.out
 */
#include "nybl.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { VOCAB = 5, DRAFTS = 2, LENGTH = DRAFTS + 1, CELLS = 125, ROUNDS = 60000 };

/* The logits after each token. */
static const float target[VOCAB][VOCAB] = {{0.0f, 1.0f, 0.5f, -1.0f, 0.2f},
                                           {0.9f, -0.4f, 0.1f, 0.8f, -2.0f},
                                           {0.3f, 0.7f, 1.2f, -0.2f, 0.0f},
                                           {-0.6f, 0.4f, 0.3f, 0.6f, 1.1f},
                                           {1.3f, 0.2f, -0.8f, 0.5f, 0.4f}};
static const float drafter[VOCAB][VOCAB] = {{0.6f, 0.2f, 0.9f, -0.3f, 0.1f},
                                            {0.1f, 0.5f, 0.4f, 1.0f, -1.0f},
                                            {0.8f, 0.9f, 0.1f, 0.3f, -0.5f},
                                            {0.2f, 0.9f, -0.7f, 0.4f, 0.5f},
                                            {0.5f, 0.8f, 0.1f, -0.2f, 1.0f}};

static void softmax(const float *logits, float temperature, float *p)
{
    float sum = 0;
    for (int i = 0; i < VOCAB; i++)
        sum += p[i] = expf(logits[i] / temperature);
    for (int i = 0; i < VOCAB; i++)
        p[i] /= sum;
}

static uint32_t likeliest(const float *logits)
{
    uint32_t best = 0;
    for (uint32_t i = 1; i < VOCAB; i++)
        if (logits[i] > logits[best])
            best = i;
    return best;
}

/* The drafter's own random numbers. */
static uint32_t draw(const float *p, uint64_t *state)
{
    float left;
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    left = (float)(*state >> 40) / 16777216.0f;
    for (uint32_t i = 0; i < VOCAB - 1; i++)
        if ((left -= p[i]) < 0)
            return i;
    return VOCAB - 1;
}

static void check(nybl_status status)
{
    char why[512];
    if (status == NYBL_OK)
        return;
    nybl_last_error(why, sizeof why);
    fprintf(stderr, "%s: %s\n", nybl_status_name(status), why);
    exit(1);
}

/* Appends at least LENGTH tokens to `text`, which holds one. As a tree, the two drafts are alternatives
 * for the same token, drawn without replacement; as a chain they follow each other. */
static void speculate(uint32_t *text, const nybl_sampler *sampler, int tree, int drawn, uint64_t *dice,
                      uint64_t *random)
{
    static const uint32_t siblings[DRAFTS] = {0, 0};
    size_t length = 1;
    while (length <= LENGTH) {
        uint32_t drafts[DRAFTS], path[DRAFTS], next;
        float logits[DRAFTS + 1][VOCAB], q[DRAFTS][VOCAB] = {{0}};
        size_t accepted;
        nybl_verify_args args = {0};

        memcpy(logits[0], target[text[length - 1]], sizeof logits[0]);
        for (int i = 0; i < DRAFTS; i++) {
            uint32_t after = i == 0 || tree ? text[length - 1] : drafts[i - 1];
            float p[VOCAB];
            softmax(drafter[after], drawn ? sampler->temperature : 1.0f, p);
            memcpy(q[i], p, sizeof p);
            if (tree && i == 1) { /* without replacement */
                float left = 1 - p[drafts[0]];
                p[drafts[0]] = 0;
                for (int id = 0; id < VOCAB; id++)
                    p[id] /= left;
            }
            drafts[i] = drawn ? draw(p, dice) : likeliest(p);
            memcpy(logits[i + 1], target[drafts[i]], sizeof logits[0]);
        }
        args.struct_size = sizeof args;
        args.vocab = VOCAB;
        args.logits = &logits[0][0];
        args.drafts = drafts;
        args.n_drafts = DRAFTS;
        args.parents = tree ? siblings : NULL;
        args.draft_probabilities = drawn ? &q[0][0] : NULL;
        args.sampler = sampler;
        check(nybl_verify(&args, random, path, &accepted, &next));
        for (size_t i = 0; i < accepted; i++)
            text[length++] = drafts[path[i] - 1];
        text[length++] = next;
    }
}

static void the_distribution_is_the_targets(int tree, int drawn)
{
    nybl_sampler sampler = {0};
    uint64_t dice = 1, random = 2;
    static unsigned counts[CELLS];
    double square = 0, freedom = CELLS - 1, spread = 2 / (9 * freedom), z;

    sampler.struct_size = sizeof sampler;
    sampler.temperature = 0.8f;
    memset(counts, 0, sizeof counts);
    for (int i = 0; i < ROUNDS; i++) {
        uint32_t text[2 * LENGTH + 1] = {0};
        speculate(text, &sampler, tree, drawn, &dice, &random);
        counts[text[1] * 25 + text[2] * 5 + text[3]]++;
    }
    for (int cell = 0; cell < CELLS; cell++) {
        int text[4] = {0, cell / 25, cell / 5 % 5, cell % 5};
        double want = ROUNDS;
        for (int i = 1; i < 4; i++) {
            float p[VOCAB];
            softmax(target[text[i - 1]], sampler.temperature, p);
            want *= p[text[i]];
        }
        square += (counts[cell] - want) * (counts[cell] - want) / want;
    }
    z = (cbrt(square / freedom) - (1 - spread)) / sqrt(spread);
    printf("tree %d, drawn %d: chi-square %.0f of %.0f cells\n", tree, drawn, square, freedom);
    if (!(z < 4.75)) { /* one in a million */
        printf("another distribution\n");
        exit(1);
    }
}

static void greedy_stays_greedy(int tree)
{
    nybl_sampler sampler = {0};
    uint64_t dice = 3;
    sampler.struct_size = sizeof sampler;
    for (uint32_t first = 0; first < VOCAB; first++) {
        uint32_t text[2 * LENGTH + 1] = {0};
        text[0] = first;
        speculate(text, &sampler, tree, 0, &dice, NULL);
        for (int i = 1; i <= LENGTH; i++)
            if (text[i] != likeliest(target[text[i - 1]])) {
                printf("not the likeliest token\n");
                exit(1);
            }
    }
}

static void penalties_see_history_and_drafts(void)
{
    static const float logits[3][VOCAB] = {{3, 2, 1, 0, 0}, {3, 2, 1, 0, 0}, {3, 2, 1, 0, 0}};
    static const uint32_t drafts[2] = {1, 2}, history[1] = {0};
    uint32_t path[2], next;
    size_t accepted;
    nybl_sampler sampler = {0};
    nybl_verify_args args = {0};

    sampler.struct_size = sizeof sampler;
    sampler.presence_penalty = 5;
    args.struct_size = sizeof args;
    args.vocab = VOCAB;
    args.logits = logits[0];
    args.drafts = drafts;
    args.n_drafts = 2;
    args.history = history;
    args.n_history = 1;
    args.sampler = &sampler;
    check(nybl_verify(&args, NULL, path, &accepted, &next));
    if (accepted != 2 || path[0] != 1 || path[1] != 2 || next != 3) {
        printf("used tokens were not penalised\n");
        exit(1);
    }
}

/* What nybl_verify() must refuse. */
static void misuse(void)
{
    float logits[2 * VOCAB] = {0};
    uint32_t draft = VOCAB, parent = 1, next = 7;
    uint64_t random = 11;
    size_t accepted = 7;
    nybl_sampler sampler = {0};
    nybl_verify_args args = {0};
    int bad = 0;

    sampler.struct_size = sizeof sampler;
    sampler.temperature = 1;
    bad |= nybl_verify(NULL, &random, NULL, &accepted, &next) != NYBL_ERR_INVALID_ARGUMENT;
    bad |= nybl_verify(&args, &random, NULL, &accepted, &next) != NYBL_ERR_INVALID_ARGUMENT;
    args.struct_size = sizeof args;
    bad |= nybl_verify(&args, &random, NULL, &accepted, &next) != NYBL_ERR_INVALID_ARGUMENT;
    args.vocab = VOCAB;
    args.logits = logits;
    args.drafts = &draft;
    args.n_drafts = 1;
    bad |= nybl_verify(&args, &random, NULL, &accepted, &next) != NYBL_ERR_INVALID_ARGUMENT;
    draft = 1;
    args.parents = &parent;
    bad |= nybl_verify(&args, &random, NULL, &accepted, &next) != NYBL_ERR_INVALID_ARGUMENT;
    args.parents = NULL;
    args.n_drafts = SIZE_MAX;
    bad |= nybl_verify(&args, &random, NULL, &accepted, &next) != NYBL_ERR_INVALID_ARGUMENT;
    args.n_drafts = 1;
    args.sampler = &sampler;
    bad |= nybl_verify(&args, NULL, NULL, &accepted, &next) != NYBL_ERR_INVALID_ARGUMENT;
    bad |= nybl_verify(&args, &random, NULL, NULL, &next) != NYBL_ERR_INVALID_ARGUMENT;
    sampler.reserved = 1;
    bad |= nybl_verify(&args, &random, NULL, &accepted, &next) != NYBL_ERR_UNSUPPORTED;
    sampler.reserved = 0;
    for (int i = 0; i < VOCAB; i++)
        logits[i] = -INFINITY;
    bad |= nybl_verify(&args, &random, NULL, &accepted, &next) != NYBL_ERR_INVALID_ARGUMENT;
    bad |= random != 11 || accepted != 0 || next != 0;
    logits[1] = 0;
    bad |= nybl_verify(&args, &random, NULL, &accepted, &next) != NYBL_OK;
    bad |= random == 11 || accepted != 1;
    if (bad) {
        printf("misuse was not answered as documented\n");
        exit(1);
    }
}

int main(void)
{
    for (int tree = 0; tree < 2; tree++) {
        the_distribution_is_the_targets(tree, 0);
        the_distribution_is_the_targets(tree, 1);
        greedy_stays_greedy(tree);
    }
    penalties_see_history_and_drafts();
    misuse();
    printf("the same distribution\n");
    return 0;
}
