"""Rules that act on single elements as one loop of C each, so that nothing goes through memory twice.

Reference: the tensor operations of the modules that call `loops`, which are also what runs without a C compiler, and
with which they agree to rounding, not to the bit.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from .native import compiled
from .slices import check_shapes

SOURCE = r"""
#include <math.h>
#include <stdint.h>
#include <string.h>

/* torch's: exact at both ends */
static inline float lerp(float a, float b, float weight) {
    return weight < 0.5f ? a + (b - a) * weight : b - (b - a) * (1 - weight);
}

/* exp(-x) of 0 <= x, no more than most = 80; were that a constant, GCC would branch and not use vectors */
static inline float fading(float x, float most) {
    x = x < most ? x : most;
    int32_t n = (int32_t)(x * 1.44269504f + 0.5f), bits = (127 - n) << 23;
    float f = (n * 0.693145752f - x) + n * 1.42860677e-6f, power;
    float y = 1.0f / 5040;
    y = y * f + 1.0f / 720;
    y = y * f + 1.0f / 120;
    y = y * f + 1.0f / 24;
    y = y * f + 1.0f / 6;
    y = y * f + 0.5f;
    y = y * f + 1;
    y = y * f + 1;
    memcpy(&power, &bits, 4);
    return y * power;
}

void friction_adam(long n, float *restrict w, const float *restrict g, float *restrict M, float *restrict V,
                   float *restrict previous, float w1, float b2, float w2, float eps, float rate, float keep,
                   float most) {
    for (long i = 0; i < n; i++) {
        float x = g[i], m = lerp(M[i], x, w1), v = V[i] * b2 + x * w2 * x;
        float friction = 1 / (1 + fading(fabsf(previous[i] - x), most));
        w[i] = w[i] * keep - rate * friction * (m / (sqrtf(v) + eps));
        M[i] = m;
        V[i] = v;
        previous[i] = x;
    }
}

void relative_friction_adam(long n, float *restrict w, const float *restrict g, float *restrict M, float *restrict V,
                            float *restrict previous, float w1, float b2, float w2, float eps, float rate, float keep,
                            float most, float root) {
    for (long i = 0; i < n; i++) {
        float x = g[i], m = lerp(M[i], x, w1), v = V[i] * b2 + x * w2 * x, d = sqrtf(v) + eps;
        float friction = 1 / (1 + fading(fabsf(previous[i] - x) / d * root, most));
        w[i] = w[i] * keep - rate * friction * (m / d);
        M[i] = m;
        V[i] = v;
        previous[i] = x;
    }
}

/* infinite theta, and V = 0: no limit */
void spike_adam(long n, float *restrict w, const float *restrict g, float *restrict M, float *restrict V,
                float w1, float b2, float w2, float eps, float rate, float keep, float theta) {
    for (long i = 0; i < n; i++) {
        float x = g[i], limit = V[i] == 0 ? INFINITY : sqrtf(V[i] * theta);
        x = x > limit ? limit : x;
        x = x < -limit ? -limit : x;
        float m = lerp(M[i], x, w1), v = V[i] * b2 + x * w2 * x;
        w[i] = w[i] * keep - rate * (m / (sqrtf(v) + eps));
        M[i] = m;
        V[i] = v;
    }
}

void lion(long n, float *restrict w, const float *restrict g, float *restrict M, float w1, float w2, float rate,
          float keep) {
    for (long i = 0; i < n; i++) {
        float x = g[i], m = M[i], u = lerp(m, x, w1);
        w[i] = w[i] * keep - rate * (float)((u > 0) - (u < 0));
        M[i] = lerp(m, x, w2);
    }
}
"""

SHARE = 1 << 18
"""Elements that one thread takes at a time."""

Task = Callable[[], object]


def loops(name: str, tensors: Sequence[Tensor], numbers: Sequence[float]) -> list[Task] | None:
    """A function of `SOURCE` on all elements, to be called part by part, in any order and by many threads.

    Args:
        name: of the function.
        tensors: of one shape, in the order of its arguments.
        numbers: its other arguments.

    Returns:
        The calls; None where the tensors or the machine do not suit.

    Raises:
        ValueError: they are of other shapes.
    """
    check_shapes(tensors[0].shape, *tensors)
    if not all(x.device.type == "cpu" and x.dtype == torch.float32 and x.is_contiguous() for x in tensors):
        return None
    library = compiled(SOURCE)
    if library is None:
        return None
    function, n = library[name], tensors[0].numel()
    last = [ctypes.c_float(x) for x in numbers]

    def part(start: int) -> None:
        places = [ctypes.c_void_p(x.data_ptr() + x.element_size() * start) for x in tensors]
        function(ctypes.c_long(min(SHARE, n - start)), *places, *last)

    return [partial(part, start) for start in range(0, n, SHARE)]
