/* Answers exported cases of layout SBH, float32, as a kernel in another language would: python -m rau cases --export.
 *
 *     cc -O2 -o answer answer.c -lm && ./answer CASE_FOLDER...
 *
 * Compiled with -DWRONG it leaves the sums out of the output's weights, as a widespread copy of the formula does. */

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_STATES = 256 };

typedef struct {
    int rank;
    long shape[4];
    long size;
    float *data;
} Array;

static void fail(const char *what, const char *path) {
    fprintf(stderr, "answer: %s: %s\n", path, what);
    exit(2);
}

/* Reads a .npy file of float32: magic, version, length of the header, a header such as
 * {'descr': '<f4', 'fortran_order': False, 'shape': (3, 1, 16), }, and the numbers. Returns 0 if there is no file. */
static int read_npy(const char *path, Array *array) {
    FILE *file = fopen(path, "rb");
    if (!file) return 0;
    unsigned char start[10];
    if (fread(start, 1, 10, file) != 10 || memcmp(start, "\x93NUMPY\x01", 7) != 0) fail("no .npy of version 1", path);
    size_t length = start[8] + 256u * start[9];
    char *header = calloc(length + 1, 1);
    if (fread(header, 1, length, file) != length) fail("cut off", path);
    if (!strstr(header, "'<f4'") || !strstr(header, "False")) fail("not float32 in C order", path);
    char *at = strchr(strstr(header, "'shape'"), '(') + 1;
    array->rank = 0;
    array->size = 1;
    while (*at != ')') {
        char *end;
        long extent = strtol(at, &end, 10);
        if (end == at || array->rank == 4) fail("strange shape", path);
        array->shape[array->rank++] = extent;
        array->size *= extent;
        at = end + strspn(end, ", ");
    }
    array->data = malloc(array->size * sizeof(float) + 1);
    if (fread(array->data, sizeof(float), array->size, file) != (size_t)array->size) fail("cut off", path);
    fclose(file);
    free(header);
    return 1;
}

static void write_npy(const char *path, const Array *like, const float *data) {
    enum { LENGTH = 118 }; /* with the 10 bytes before it, a multiple of 64 */
    char header[LENGTH + 1], shape[64] = "";
    for (int axis = 0; axis < like->rank; axis++) {
        size_t used = strlen(shape);
        snprintf(shape + used, sizeof shape - used, "%ld, ", like->shape[axis]);
    }
    int used = snprintf(header, LENGTH, "{'descr': '<f4', 'fortran_order': False, 'shape': (%s), }", shape);
    if (used >= LENGTH) fail("its shape is too long to write", path);
    memset(header + used, ' ', LENGTH - used);
    header[LENGTH - 1] = '\n';
    unsigned char start[10] = {0x93, 'N', 'U', 'M', 'P', 'Y', 1, 0, LENGTH, 0};
    FILE *file = fopen(path, "wb");
    if (!file) fail("cannot be written", path);
    fwrite(start, 1, 10, file);
    fwrite(header, 1, LENGTH, file);
    fwrite(data, sizeof(float), like->size, file);
    if (fclose(file) != 0) fail("cannot be written", path);
}

static Array part(const char *folder, int state, const char *name) {
    char path[4096];
    Array array = {0};
    snprintf(path, sizeof path, "%s/in.%d.%s.npy", folder, state, name);
    if (!read_npy(path, &array)) array.rank = -1;
    return array;
}

/* The weights of one row's states; 0: not to be read. Returns how many states are live, `only` is one of them. */
static int merge_row(
    int states, const double *m, const double *l, double *weight, double *max, double *sum, int *only
) {
    int live = 0, nan_max = 0, nan_sum = 0, infinite = 0;
    *max = -INFINITY;
    *sum = 0;
    for (int k = 0; k < states; k++) {
        weight[k] = 0;
        if (l[k] == 0 || m[k] == -INFINITY) continue;
        live++;
        *only = k;
        nan_max |= isnan(m[k]) != 0;
        nan_sum |= isnan(l[k]) != 0;
        infinite |= isinf(l[k]) != 0;
        if (m[k] > *max) *max = m[k];
    }
    if (live < 2) return live;
    if (nan_max) *max = NAN;
    for (int k = 0; k < states; k++) {
        if (l[k] == 0 || m[k] == -INFINITY) continue;
        double e = m[k] - *max < -708 ? 0 : exp(m[k] - *max); /* inf - inf is NaN: so is what follows */
        weight[k] = l[k] * e;
        *sum += weight[k];
    }
    for (int k = 0; k < states; k++) {
        if (l[k] == 0 || m[k] == -INFINITY) continue;
#ifdef WRONG
        weight[k] = (float)exp(m[k] - *max);
#else
        weight[k] = (float)(weight[k] / *sum);
#endif
        if (nan_max || nan_sum || infinite || isinf(*max)) weight[k] = NAN;
    }
    if (isinf(*max)) *sum = NAN;
    return live;
}

static void answer(const char *folder) {
    Array o[MOST_STATES], m[MOST_STATES], l[MOST_STATES];
    int states = 0;
    while (states < MOST_STATES && (o[states] = part(folder, states, "attn_out")).rank >= 0) {
        m[states] = part(folder, states, "softmax_max");
        l[states] = part(folder, states, "softmax_sum");
        states++;
    }
    if (!states || o[0].rank != 3 || m[0].rank != 4) fail("no case of layout SBH", folder);
    long S = o[0].shape[0], B = o[0].shape[1], H = o[0].shape[2], N = m[0].shape[1], lanes = m[0].shape[3];
    long D = N ? H / N : 0;
    float *out = calloc(o[0].size + 1, sizeof(float));
    float *out_max = calloc(m[0].size + 1, sizeof(float)), *out_sum = calloc(m[0].size + 1, sizeof(float));

    for (long b = 0; b < B; b++)
        for (long n = 0; n < N; n++)
            for (long s = 0; s < S; s++) {
                long row = ((b * N + n) * S + s) * lanes, first = (s * B + b) * H + n * D;
                double maxima[MOST_STATES], sums[MOST_STATES], weight[MOST_STATES], max, sum;
                int only = 0;
                for (int k = 0; k < states; k++) {
                    maxima[k] = m[k].data[row];
                    sums[k] = l[k].data[row];
                }
                int live = merge_row(states, maxima, sums, weight, &max, &sum, &only);
                if (live == 1) {
                    max = maxima[only];
                    sum = sums[only];
                    memcpy(out + first, o[only].data + first, D * sizeof(float));
                }
                for (long d = 0; live > 1 && d < D; d++) {
                    float total = 0;
                    int any = 0;
                    for (int k = 0; k < states; k++) {
                        if (weight[k] == 0) continue;
                        float product = (float)weight[k] * o[k].data[first + d];
                        total = any ? total + product : product; /* 0 + -0.0 would lose a sign */
                        any = 1;
                    }
                    out[first + d] = total;
                }
                for (long lane = 0; lane < lanes; lane++) {
                    out_max[row + lane] = (float)max;
                    out_sum[row + lane] = (float)sum;
                }
            }

    char path[4096];
    snprintf(path, sizeof path, "%s/out.attn_out.npy", folder);
    write_npy(path, &o[0], out);
    snprintf(path, sizeof path, "%s/out.softmax_max.npy", folder);
    write_npy(path, &m[0], out_max);
    snprintf(path, sizeof path, "%s/out.softmax_sum.npy", folder);
    write_npy(path, &m[0], out_sum);
    for (int k = 0; k < states; k++) {
        free(o[k].data);
        free(m[k].data);
        free(l[k].data);
    }
    free(out);
    free(out_max);
    free(out_sum);
}

int main(int count, char **folders) {
    for (int i = 1; i < count; i++) answer(folders[i]);
    return 0;
}
