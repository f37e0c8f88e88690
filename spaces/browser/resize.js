// Pillow's resampling of 8-bit RGB images, in the same fixed-point arithmetic, so that a resized picture has the same
// bytes as in Python. https://github.com/python-pillow/Pillow/blob/main/src/libImaging/Resample.c

const PRECISION_BITS = 22; // of a coefficient; Pillow's 32 - 8 - 2
const STRIP_PIXELS = 1 << 20; // read from the picture at once, so that a large one needs little memory

const sinc = (x) => (x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x));

// Kernels by Pillow's numbers, which preprocessor_config.json uses: half their width, and their value at a distance.
export const KERNELS = {
  0: { name: "nearest" },
  1: { name: "lanczos", support: 3, value: (x) => (-3 <= x && x < 3 ? sinc(x) * sinc(x / 3) : 0) },
  2: { name: "bilinear", support: 1, value: (x) => Math.max(1 - Math.abs(x), 0) },
  3: { name: "bicubic", support: 2, value: bicubic },
  4: { name: "box", support: 0.5, value: (x) => (-0.5 < x && x <= 0.5 ? 1 : 0) },
  5: {
    name: "hamming",
    support: 1,
    value: (x) => (Math.abs(x) >= 1 ? 0 : sinc(x) * (Math.fround(0.54) + Math.fround(0.46) * Math.cos(Math.PI * x))),
  },
};

function bicubic(x) {
  const a = -0.5;
  x = Math.abs(x);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

/**
 * Compute, for each of `after` pixels of a line, the first of the `before` pixels it is made of, and their weights.
 * @returns {{first: number, weights: Int32Array}[]}
 */
function lineWeights(before, after, kernel) {
  const scale = before / after;
  const lines = [];
  for (let i = 0, nearest = scale / 2; i < after; i++, nearest += scale) {
    if (kernel.support === undefined) {
      lines.push({ first: Math.min(Math.floor(nearest), before - 1), weights: Int32Array.of(1 << PRECISION_BITS) });
      continue;
    }
    const centre = (i + 0.5) * scale;
    const stretch = Math.max(scale, 1); // a smaller picture averages over more pixels
    const reach = kernel.support * stretch;
    const first = Math.max(Math.trunc(centre - reach + 0.5), 0);
    const end = Math.min(Math.trunc(centre + reach + 0.5), before);
    const values = [];
    for (let x = first; x < end; x++) values.push(kernel.value((x - centre + 0.5) / stretch));
    const sum = values.reduce((a, b) => a + b, 0);
    const fixed = values.map((v) => {
      const scaled = (v / sum) * 2 ** PRECISION_BITS;
      return Math.trunc(scaled + (scaled < 0 ? -0.5 : 0.5));
    });
    lines.push({ first, weights: Int32Array.from(fixed) });
  }
  return lines;
}

const toByte = (sum) => Math.min(Math.max(sum >> PRECISION_BITS, 0), 255);

/**
 * Resize a picture.
 * @param {(top: number, rows: number) => Uint8ClampedArray} readRows Reads rows of the picture as RGBA.
 * @param {{width: number, height: number}} before Size of the picture.
 * @param {{width: number, height: number}} after Size of the result.
 * @param {object} kernel One of KERNELS.
 * @returns {Uint8Array} RGB, (height, width, 3).
 */
export function resize(readRows, before, after, kernel) {
  const half = 1 << (PRECISION_BITS - 1);
  const columns = lineWeights(before.width, after.width, kernel);
  const narrow = new Uint8Array(before.height * after.width * 3);
  const strip = Math.max(Math.floor(STRIP_PIXELS / before.width), 1);
  for (let top = 0; top < before.height; top += strip) {
    const rows = Math.min(strip, before.height - top);
    const pixels = readRows(top, rows);
    for (let y = 0; y < rows; y++) {
      for (let x = 0; x < after.width; x++) {
        const { first, weights } = columns[x];
        let [red, green, blue] = [half, half, half];
        for (let k = 0, at = 4 * (y * before.width + first); k < weights.length; k++, at += 4) {
          const weight = weights[k];
          red += pixels[at] * weight;
          green += pixels[at + 1] * weight;
          blue += pixels[at + 2] * weight;
        }
        const to = 3 * ((top + y) * after.width + x);
        narrow[to] = toByte(red);
        narrow[to + 1] = toByte(green);
        narrow[to + 2] = toByte(blue);
      }
    }
  }
  const result = new Uint8Array(after.height * after.width * 3);
  const width = 3 * after.width;
  lineWeights(before.height, after.height, kernel).forEach(({ first, weights }, y) => {
    for (let x = 0; x < width; x++) {
      let sum = half;
      for (let k = 0, at = first * width + x; k < weights.length; k++, at += width) sum += narrow[at] * weights[k];
      result[y * width + x] = toByte(sum);
    }
  });
  return result;
}
