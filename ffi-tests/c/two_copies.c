/* Two copies of the library in one program: neither sees the other. */
#include <stdio.h>
#include <string.h>

size_t one_run(const char *path, char *story, size_t capacity, char *error, size_t error_capacity);
size_t two_run(const char *path, char *story, size_t capacity, char *error, size_t error_capacity);
size_t one_nybl_last_error(char *buffer, size_t capacity);

int main(int argc, char **argv)
{
    static char story[2][2000], error[2][200] = {"/first", "/second"};
    char last[200];
    size_t one, two;

    if (argc < 2)
        return 2;
    one = one_run(argv[1], story[0], sizeof story[0], error[0], sizeof error[0]);
    two = two_run(argv[1], story[1], sizeof story[1], error[1], sizeof error[1]);
    if (one < 100 || one != two || memcmp(story[0], story[1], one) != 0)
        return fprintf(stderr, "%zu and %zu bytes of story\n", one, two), 1;
    /* The last error is the one thing that is global: to a thread, in a copy. */
    one_nybl_last_error(last, sizeof last);
    if (!strstr(last, "/first") || !strstr(error[1], "/second"))
        return fprintf(stderr, "errors \"%s\" and \"%s\"\n", last, error[1]), 1;
    puts("two copies, the same story");
    return 0;
}
