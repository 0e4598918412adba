/* BNET for one floating point type; included by cpu.c with REAL and NAME() set.
 *
 * One channel after the other, all images of it: its planes stay in the cache, so the map itself is read once forward
 * and once backward. Rows are copied into planes with a border of zeros, which makes the convolution free of cases.
 */

enum { NAME(LANES) = 64 / sizeof(REAL), NAME(BLOCK) = 4 * 64 / sizeof(REAL) };

typedef REAL NAME(vec) __attribute__((vector_size(64)));
typedef REAL NAME(loose) __attribute__((vector_size(64), aligned(sizeof(REAL)), may_alias));

/* What to compute, from and into what:
 *
 *   maps x, grad, residual, y, grad_x: (n, c, h, w), all contiguous or, `last`, all channels-last
 *   kernels weight, grad_weight: (c, k, k), k odd
 *   values of channels bias, grad_bias, mean, var: (c)
 *   eps: added to the variance, in units of x squared
 *   of_batch: mean and var are those of x, to be computed forward; else they are given
 *   needs_x, needs_weight: which gradients are wanted backward; relu: whether forward ends with it
 *
 * NULL: none. What is not const is written to. */
typedef struct {
    const REAL *x, *grad, *weight, *bias, *residual;
    REAL *y, *grad_x, *grad_weight, *grad_bias, *mean, *var;
    int64_t values[11]; /* that lie at each of these, in this order */
    double eps;
    int64_t n, c, h, w;
    int32_t k, last, of_batch, needs_x, needs_weight, relu;
} NAME(job);

#define LOAD(p) (*(const NAME(loose) *)(p))

static inline double NAME(total)(const NAME(vec) *v) {
    double sum = 0;
    for (int i = 0; i < NAME(LANES); i++) sum += (*v)[i];
    return sum;
}

/* Sum of (x - shift) ^ power over a plane; each row in REAL, the rows in double. */
CLONES static double NAME(moment)(const REAL *x, int64_t count, REAL shift, int power) {
    double sum = 0;
    for (int64_t start = 0; start < count; start += 4096) {
        const int64_t end = start + 4096 < count ? start + 4096 : count;
        NAME(vec) part[4] = {{0}};
        int64_t i = start;
        for (; i + NAME(BLOCK) <= end; i += NAME(BLOCK))
            for (int b = 0; b < 4; b++) {
                const NAME(vec) d = LOAD(x + i + b * NAME(LANES)) - shift;
                part[b] += power == 2 ? d * d : d;
            }
        sum += NAME(total)(part) + NAME(total)(part + 1) + NAME(total)(part + 2) + NAME(total)(part + 3);
        for (; i < end; i++) sum += power == 2 ? (double)(x[i] - shift) * (x[i] - shift) : x[i] - shift;
    }
    return sum;
}

/* dst: a plane with a zeroed border, whose inner part becomes (src - shift) * scale. */
CLONES static void NAME(fill)(REAL *dst, const REAL *src, int64_t h, int64_t w, int k, REAL shift, REAL scale) {
    const int64_t stride = w + k - 1;
    dst += (k / 2) * stride + k / 2;
    for (int64_t row = 0; row < h; row++)
        for (int64_t col = 0; col < w; col++) dst[row * stride + col] = (src[row * w + col] - shift) * scale;
}

/* out = row, or what the end of a residual block makes of it. Not a number stays that. */
static inline __attribute__((always_inline)) void NAME(end_row)(
    REAL *out, const REAL *row, const REAL *residual, int64_t w, int relu) {
    if (residual && relu)
        for (int64_t i = 0; i < w; i++) {
            const REAL value = row[i] + residual[i];
            out[i] = value < 0 ? 0 : value;
        }
    else if (residual)
        for (int64_t i = 0; i < w; i++) out[i] = row[i] + residual[i];
    else if (relu)
        for (int64_t i = 0; i < w; i++) out[i] = row[i] < 0 ? 0 : row[i];
    else memcpy(out, row, w * sizeof(REAL));
}

/* out = bias + kernel * plane. Runs over the plane as one long row; what it computes between the rows is not copied. */
static inline __attribute__((always_inline)) void NAME(convolve_k)(
    REAL *out, REAL *row_by_row, const REAL *plane, const REAL *kernel, REAL bias, const REAL *residual, int64_t h,
    int64_t w, const int k, int relu) {
    const int64_t stride = w + k - 1;
    for (int64_t at = 0; at < h * stride; at += NAME(BLOCK)) {
        const NAME(vec) start = bias - (NAME(vec)){0};
        NAME(vec) acc[4] = {start, start, start, start};
        for (int i = 0; i < k; i++)
            for (int j = 0; j < k; j++) {
                const REAL *p = plane + at + i * stride + j;
                for (int b = 0; b < 4; b++) acc[b] += kernel[i * k + j] * LOAD(p + b * NAME(LANES));
            }
        for (int b = 0; b < 4; b++) *(NAME(loose) *)(row_by_row + at + b * NAME(LANES)) = acc[b];
    }
    for (int64_t row = 0; row < h; row++)
        NAME(end_row)(out + row * w, row_by_row + row * stride, residual ? residual + row * w : NULL, w, relu);
}

CLONES static void NAME(convolve)(
    REAL *out, REAL *row_by_row, const REAL *plane, const REAL *kernel, REAL bias, const REAL *residual, int64_t h,
    int64_t w, int k, int relu) {
    if (k == 3) NAME(convolve_k)(out, row_by_row, plane, kernel, bias, residual, h, w, 3, relu);
    else if (k == 5) NAME(convolve_k)(out, row_by_row, plane, kernel, bias, residual, h, w, 5, relu);
    else if (k == 7) NAME(convolve_k)(out, row_by_row, plane, kernel, bias, residual, h, w, 7, relu);
    else NAME(convolve_k)(out, row_by_row, plane, kernel, bias, residual, h, w, k, relu);
}

/* sums[i * k + j] += sum of grad[row, col] * plane[row + i, col + j]; both planes are bordered. */
static inline __attribute__((always_inline)) void NAME(correlate_k)(
    double *sums, const REAL *grad, const REAL *plane, int64_t h, int64_t w, const int k, const int unrolled) {
    const int64_t stride = w + k - 1;
    grad += (k / 2) * stride + k / 2;
    for (int i = 0; i < k; i++)
        for (int first = 0; first < k; first += unrolled) {
            NAME(vec) acc[7] = {{0}};
            for (int64_t at = 0; at < h * stride; at += NAME(LANES)) {
                const NAME(vec) g = LOAD(grad + at);
                const REAL *p = plane + at + i * stride + first;
                for (int j = 0; j < unrolled; j++) acc[j] += g * LOAD(p + j);
            }
            for (int j = 0; j < unrolled; j++) sums[i * k + first + j] += NAME(total)(acc + j);
        }
}

CLONES static void NAME(correlate)(double *sums, const REAL *grad, const REAL *plane, int64_t h, int64_t w, int k) {
    if (k == 3) NAME(correlate_k)(sums, grad, plane, h, w, 3, 3);
    else if (k == 5) NAME(correlate_k)(sums, grad, plane, h, w, 5, 5);
    else if (k == 7) NAME(correlate_k)(sums, grad, plane, h, w, 7, 7);
    else NAME(correlate_k)(sums, grad, plane, h, w, k, 1);
}

/* grad_x = rstd * (grad_x - average - (x - mean) * slope) */
CLONES static void NAME(finish)(
    REAL *grad_x, const REAL *x, int64_t count, REAL mean, REAL rstd, REAL average, REAL slope) {
    for (int64_t i = 0; i < count; i++) grad_x[i] = rstd * (grad_x[i] - average - (x[i] - mean) * slope);
}

static int NAME(channels)(void *argument, int64_t begin, int64_t end, int backward) {
    const NAME(job) *job = argument;
    const int k = job->k, area = k * k;
    const int64_t n = job->n, h = job->h, w = job->w, size = h * w;
    const double count = (double)n * size;
    /* The last block of columns reaches beyond the last row. */
    const size_t plane_size = (size_t)(h + k - 1) * (w + k - 1) + NAME(BLOCK) + k;
    REAL *plane = calloc(plane_size, sizeof(REAL)), *other = backward ? calloc(plane_size, sizeof(REAL)) : plane;
    REAL *row_by_row = malloc(plane_size * sizeof(REAL)), *flipped = malloc(area * sizeof(REAL));
    double *sums = malloc(area * sizeof(double));
    int failed = !plane || !other || !row_by_row || !flipped || !sums;
    for (int64_t c = begin; c < end && !failed; c++) {
        const REAL *weight = job->weight + c * area;
        if (!backward && job->of_batch) {
            double sum = 0, squares = 0;
            for (int64_t i = 0; i < n; i++) sum += NAME(moment)(job->x + (i * job->c + c) * size, size, 0, 1);
            job->mean[c] = sum / count;
            for (int64_t i = 0; i < n; i++)
                squares += NAME(moment)(job->x + (i * job->c + c) * size, size, job->mean[c], 2);
            job->var[c] = squares / count;
        }
        const REAL mean = job->mean[c], rstd = 1 / sqrt((double)job->var[c] + job->eps);
        if (!backward) {
            for (int64_t i = 0; i < n; i++) {
                const int64_t at = (i * job->c + c) * size;
                NAME(fill)(plane, job->x + at, h, w, k, mean, rstd);
                const REAL *residual = job->residual ? job->residual + at : NULL;
                NAME(convolve)(job->y + at, row_by_row, plane, weight, job->bias[c], residual, h, w, k, job->relu);
            }
            continue;
        }
        for (int t = 0; t < area; t++) sums[t] = 0, flipped[t] = weight[area - 1 - t];
        double bias = 0, average = 0, slope = 0;
        for (int64_t i = 0; i < n; i++) {
            const int64_t at = (i * job->c + c) * size;
            bias += NAME(moment)(job->grad + at, size, 0, 1);
            NAME(fill)(other, job->grad + at, h, w, k, 0, 1);
            if (job->needs_weight || job->of_batch) {
                NAME(fill)(plane, job->x + at, h, w, k, mean, rstd);
                NAME(correlate)(sums, other, plane, h, w, k);
            }
            if (job->needs_x) {
                NAME(convolve)(job->grad_x + at, row_by_row, other, flipped, 0, NULL, h, w, k, 0);
                if (job->of_batch) average += NAME(moment)(job->grad_x + at, size, 0, 1);
            }
        }
        job->grad_bias[c] = bias;
        for (int t = 0; t < area; t++) {
            job->grad_weight[c * area + t] = sums[t];
            slope += sums[t] * weight[t];
        }
        if (job->needs_x) {
            average = job->of_batch ? average / count : 0;
            slope = job->of_batch ? slope / count * rstd : 0;
            for (int64_t i = 0; i < n; i++) {
                const int64_t at = (i * job->c + c) * size;
                NAME(finish)(job->grad_x + at, job->x + at, size, mean, rstd, average, slope);
            }
        }
    }
    if (other != plane) free(other);
    free(plane), free(row_by_row), free(flipped), free(sums);
    return failed;
}

/* The same for channels-last maps, a vector of channels at a time: planes hold LANES channels next to each other. */

/* Sum of (x - shift) ^ power over all pixels of up to LANES channels. */
CLONES static void NAME(moment_last)(
    double *sums, const REAL *x, int64_t pixels, int64_t channels, int lanes, const REAL *shift, int power) {
    const NAME(vec) minus = LOAD(shift);
    for (int l = 0; l < lanes; l++) sums[l] = 0;
    for (int64_t start = 0; start < pixels; start += 1024) {
        const int64_t end = start + 1024 < pixels ? start + 1024 : pixels;
        NAME(vec) part[4] = {{0}};
        for (int64_t i = start; i < end; i++) {
            NAME(vec) d = {0};
            if (lanes == NAME(LANES)) d = LOAD(x + i * channels);
            else memcpy(&d, x + i * channels, lanes * sizeof(REAL));
            d -= minus;
            part[i % 4] += power == 2 ? d * d : d;
        }
        part[0] += part[1] + part[2] + part[3];
        for (int l = 0; l < lanes; l++) sums[l] += part[0][l];
    }
}

CLONES static void NAME(fill_last)(
    REAL *dst, const REAL *src, int64_t channels, int64_t h, int64_t w, int k, int lanes, const REAL *shift,
    const REAL *scale, REAL *sums) {
    const NAME(vec) minus = LOAD(shift), times = LOAD(scale);
    NAME(vec) sum = {0};
    for (int64_t row = 0; row < h; row++)
        for (int64_t col = 0; col < w; col++) {
            const REAL *from = src + (row * w + col) * channels;
            NAME(vec) value = {0};
            if (lanes == NAME(LANES)) value = LOAD(from);
            else memcpy(&value, from, lanes * sizeof(REAL));
            value = (value - minus) * times;
            sum += value;
            *(NAME(loose) *)(dst + ((row + k / 2) * (w + k - 1) + col + k / 2) * NAME(LANES)) = value;
        }
    *(NAME(loose) *)sums += sum;
}

static inline __attribute__((always_inline)) void NAME(convolve_last_k)(
    REAL *out, const REAL *plane, const REAL *kernel, const REAL *bias, const REAL *residual, int64_t channels, int64_t h,
    int64_t w, const int k, int lanes, int relu, REAL *sums) {
    const int64_t stride = w + k - 1;
    NAME(vec) sum = {0};
    for (int64_t row = 0; row < h; row++)
        for (int64_t col = 0; col < w; col += 4) {
            const int columns = w - col < 4 ? w - col : 4;
            const NAME(vec) start = LOAD(bias);
            NAME(vec) acc[4] = {start, start, start, start};
            for (int i = 0; i < k; i++)
                for (int j = 0; j < k; j++) {
                    const NAME(vec) value = LOAD(kernel + (i * k + j) * NAME(LANES));
                    const REAL *p = plane + ((row + i) * stride + col + j) * NAME(LANES);
                    for (int b = 0; b < 4; b++) acc[b] += value * LOAD(p + b * NAME(LANES));
                }
            for (int b = 0; b < columns; b++) {
                const int64_t pixel = (row * w + col + b) * channels;
                REAL *to = out + pixel;
                if (residual) {
                    NAME(vec) other = {0};
                    if (lanes == NAME(LANES)) other = LOAD(residual + pixel);
                    else memcpy(&other, residual + pixel, lanes * sizeof(REAL));
                    acc[b] += other;
                }
                if (relu) {
                    typedef __typeof__(acc[b] < 0) bits;
                    acc[b] = (NAME(vec))((bits)acc[b] & ~(acc[b] < 0));
                }
                sum += acc[b];
                if (lanes == NAME(LANES)) *(NAME(loose) *)to = acc[b];
                else memcpy(to, &acc[b], lanes * sizeof(REAL));
            }
        }
    *(NAME(loose) *)sums += sum;
}

CLONES static void NAME(convolve_last)(
    REAL *out, const REAL *plane, const REAL *kernel, const REAL *bias, const REAL *residual, int64_t channels, int64_t h,
    int64_t w, int k, int lanes, int relu, REAL *sums) {
    if (k == 3) NAME(convolve_last_k)(out, plane, kernel, bias, residual, channels, h, w, 3, lanes, relu, sums);
    else if (k == 5) NAME(convolve_last_k)(out, plane, kernel, bias, residual, channels, h, w, 5, lanes, relu, sums);
    else if (k == 7) NAME(convolve_last_k)(out, plane, kernel, bias, residual, channels, h, w, 7, lanes, relu, sums);
    else NAME(convolve_last_k)(out, plane, kernel, bias, residual, channels, h, w, k, lanes, relu, sums);
}

static inline __attribute__((always_inline)) void NAME(correlate_last_k)(
    REAL *sums, const REAL *grad, const REAL *plane, int64_t h, int64_t w, const int k, const int unrolled) {
    const int64_t stride = w + k - 1;
    grad += ((k / 2) * stride + k / 2) * NAME(LANES);
    for (int i = 0; i < k; i++)
        for (int first = 0; first < k; first += unrolled) {
            NAME(vec) acc[7] = {{0}};
            for (int64_t row = 0; row < h; row++)
                for (int64_t col = 0; col < w; col++) {
                    const NAME(vec) g = LOAD(grad + (row * stride + col) * NAME(LANES));
                    const REAL *p = plane + ((row + i) * stride + col + first) * NAME(LANES);
                    for (int j = 0; j < unrolled; j++) acc[j] += g * LOAD(p + j * NAME(LANES));
                }
            for (int j = 0; j < unrolled; j++) *(NAME(loose) *)(sums + (i * k + first + j) * NAME(LANES)) += acc[j];
        }
}

CLONES static void NAME(correlate_last)(REAL *sums, const REAL *grad, const REAL *plane, int64_t h, int64_t w, int k) {
    if (k == 3) NAME(correlate_last_k)(sums, grad, plane, h, w, 3, 3);
    else if (k == 5) NAME(correlate_last_k)(sums, grad, plane, h, w, 5, 5);
    else if (k == 7) NAME(correlate_last_k)(sums, grad, plane, h, w, 7, 7);
    else NAME(correlate_last_k)(sums, grad, plane, h, w, k, 1);
}

CLONES static void NAME(finish_last)(
    REAL *grad_x, const REAL *x, int64_t pixels, int64_t channels, int lanes, const REAL *mean, const REAL *rstd,
    const REAL *average, const REAL *slope) {
    for (int64_t i = 0; i < pixels; i++)
        for (int l = 0; l < lanes; l++) {
            REAL *g = grad_x + i * channels + l;
            *g = rstd[l] * (*g - average[l] - (x[i * channels + l] - mean[l]) * slope[l]);
        }
}

static int NAME(channels_last)(void *argument, int64_t begin, int64_t end, int backward) {
    const NAME(job) *job = argument;
    enum { L = NAME(LANES) };
    const int k = job->k, area = k * k;
    const int64_t n = job->n, h = job->h, w = job->w, image = h * w * job->c;
    const double count = (double)n * h * w;
    /* The last columns are read four at a time, beyond the last row. */
    const size_t plane_size = ((size_t)(h + k - 1) * (w + k - 1) + 4) * L;
    REAL *plane = calloc(plane_size, sizeof(REAL)), *other = backward ? calloc(plane_size, sizeof(REAL)) : plane;
    REAL *packed = malloc(area * L * sizeof(REAL)), *sums = malloc(area * L * sizeof(REAL));
    int failed = !plane || !other || !packed || !sums;
    for (int64_t block = begin; block < end && !failed; block++) {
        const int64_t c = block * L;
        const int lanes = job->c - c < L ? job->c - c : L;
        REAL mean[L] = {0}, rstd[L] = {0}, bias[L] = {0}, average[L] = {0}, slope[L] = {0}, zero[L] = {0}, one[L];
        for (int l = 0; l < L; l++) one[l] = 1;
        memset(sums, 0, area * L * sizeof(REAL));
        memset(packed, 0, area * L * sizeof(REAL));
        if (!backward && job->of_batch) {
            double first[L], second[L];
            for (int l = 0; l < lanes; l++) mean[l] = job->x[c + l]; /* near enough for a mean without cancellation */
            NAME(moment_last)(first, job->x + c, n * h * w, job->c, lanes, mean, 1);
            for (int l = 0; l < lanes; l++) mean[l] += first[l] / count;
            NAME(moment_last)(second, job->x + c, n * h * w, job->c, lanes, mean, 2);
            for (int l = 0; l < lanes; l++) job->mean[c + l] = mean[l], job->var[c + l] = second[l] / count;
        }
        for (int l = 0; l < lanes; l++) {
            mean[l] = job->mean[c + l];
            rstd[l] = 1 / sqrt((double)job->var[c + l] + job->eps);
            if (!backward) bias[l] = job->bias[c + l];
            for (int t = 0; t < area; t++) packed[t * L + l] = job->weight[(c + l) * area + (backward ? area - 1 - t : t)];
        }
        if (!backward) {
            for (int64_t i = 0; i < n; i++) {
                NAME(fill_last)(plane, job->x + i * image + c, job->c, h, w, k, lanes, mean, rstd, average);
                const REAL *residual = job->residual ? job->residual + i * image + c : NULL;
                NAME(convolve_last)(
                    job->y + i * image + c, plane, packed, bias, residual, job->c, h, w, k, lanes, job->relu, slope);
            }
            continue;
        }
        for (int64_t i = 0; i < n; i++) {
            NAME(fill_last)(other, job->grad + i * image + c, job->c, h, w, k, lanes, zero, one, bias);
            if (job->needs_weight || job->of_batch) {
                REAL unused[L] = {0};
                NAME(fill_last)(plane, job->x + i * image + c, job->c, h, w, k, lanes, mean, rstd, unused);
                NAME(correlate_last)(sums, other, plane, h, w, k);
            }
            if (job->needs_x)
                NAME(convolve_last)(
                    job->grad_x + i * image + c, other, packed, zero, NULL, job->c, h, w, k, lanes, 0, average);
        }
        for (int l = 0; l < lanes; l++) {
            job->grad_bias[c + l] = bias[l];
            for (int t = 0; t < area; t++) {
                job->grad_weight[(c + l) * area + t] = sums[t * L + l];
                slope[l] += sums[t * L + l] * job->weight[(c + l) * area + t];
            }
            average[l] = job->of_batch ? average[l] / count : 0;
            slope[l] = job->of_batch ? slope[l] / count * rstd[l] : 0;
        }
        for (int64_t i = 0; i < n && job->needs_x; i++)
            NAME(finish_last)(
                job->grad_x + i * image + c, job->x + i * image + c, h * w, job->c, lanes, mean, rstd, average, slope);
    }
    if (other != plane) free(other);
    free(plane), free(packed), free(sums);
    return failed;
}

static int NAME(forward_work)(void *argument, int64_t begin, int64_t end) {
    const NAME(job) *job = argument;
    return (job->last ? NAME(channels_last) : NAME(channels))(argument, begin, end, 0);
}

static int NAME(backward_work)(void *argument, int64_t begin, int64_t end) {
    const NAME(job) *job = argument;
    return (job->last ? NAME(channels_last) : NAME(channels))(argument, begin, end, 1);
}

/* Is every array there that will be read or written, with as many values as the sizes say, and all sizes numbers?
 * compiled.py asks more, and better; a job that did not come through there shall not end in somebody else's memory. */
static int NAME(is_sound)(const NAME(job) *job, int backward) {
    const int64_t k = job->k, largest = (int64_t)1 << 48;
    if (k < 1 || k % 2 == 0 || k > LARGEST_KERNEL || job->h < 0 || job->h > largest || job->w < 0 || job->w > largest)
        return 0;
    int64_t map = sizeof(REAL), kernels = k * k, plane = NAME(LANES) * sizeof(REAL);
    if (!multiply(&map, job->n) || !multiply(&map, job->c) || !multiply(&map, job->h) || !multiply(&map, job->w)) return 0;
    if (!multiply(&kernels, job->c)) return 0;
    map /= sizeof(REAL);
    /* The border is there where the map is empty, too; somewhat more is read beyond the end. */
    if (map && (!multiply(&plane, job->h + k) || !multiply(&plane, job->w + k) || plane > INT64_MAX / 2)) return 0;
    if (!backward && job->of_batch && map <= job->c) return 0;
    const void *const at[11] = {job->x,      job->grad,        job->weight,    job->bias, job->residual, job->y,
                                job->grad_x, job->grad_weight, job->grad_bias, job->mean, job->var};
    const int64_t size[11] = {map, map, kernels, job->c, map, map, map, kernels, job->c, job->c, job->c};
    const int in_forward[11] = {1, 0, 1, 1, job->residual != NULL, 1, 0, 0, 0, 1, 1};
    const int in_backward[11] = {1, 1, 1, 0, 0, 0, job->needs_x, 1, 1, 1, 1};
    for (int i = 0; i < 11; i++) {
        if (!(backward ? in_backward : in_forward)[i]) continue;
        if (job->values[i] != size[i] || (size[i] && !at[i])) return 0;
    }
    return 1;
}

static inline int64_t NAME(pieces)(const NAME(job) *job) {
    return job->last ? (job->c + NAME(LANES) - 1) / NAME(LANES) : job->c;
}

EXPORT int NAME(bnet_forward)(NAME(job) *job, int threads, team openmp) {
    if (!NAME(is_sound)(job, 0)) return REFUSED;
    if (job->n == 0 || job->c == 0 || job->h == 0 || job->w == 0) return DONE;
    return in_threads(NAME(forward_work), job, NAME(pieces)(job), threads, openmp);
}

EXPORT int NAME(bnet_backward)(NAME(job) *job, int threads, team openmp) {
    if (!NAME(is_sound)(job, 1)) return REFUSED;
    if (job->n == 0 || job->c == 0 || job->h == 0 || job->w == 0) {
        for (int64_t i = 0; i < job->c * job->k * job->k; i++) job->grad_weight[i] = 0;
        for (int64_t i = 0; i < job->c; i++) job->grad_bias[i] = 0;
        return DONE;
    }
    return in_threads(NAME(backward_work), job, NAME(pieces)(job), threads, openmp);
}

#undef LOAD
