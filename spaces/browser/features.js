// What is computed from patch features: similarities, and principal components as colours. The same as
// pivot_hub/explain/patch_features.py; features are rows of one Float32Array, (grid * grid, width).

const LEAST = 1e-12;

/**
 * Find the grid of patches among an encoder's tokens: CLS and registers come first and are dropped.
 * @returns {{grid: number, prefix: number} | null} Null if the tokens are no square and a few before it.
 */
export function patchGrid(tokens) {
  const grid = Math.floor(Math.sqrt(tokens));
  const prefix = tokens - grid * grid;
  return grid > 1 && prefix <= 8 ? { grid, prefix } : null;
}

/** Cosine similarity of one patch with every patch, from -1 to 1. */
export function similarity({ features, width }, patch) {
  const rows = features.length / width;
  const result = new Float32Array(rows);
  const norm = (row) => {
    let sum = 0;
    for (let i = row * width; i < (row + 1) * width; i++) sum += features[i] * features[i];
    return Math.max(Math.sqrt(sum), LEAST);
  };
  const own = norm(patch);
  for (let row = 0; row < rows; row++) {
    let sum = 0;
    for (let i = 0; i < width; i++) sum += features[row * width + i] * features[patch * width + i];
    result[row] = sum / own / norm(row);
  }
  return result;
}

/**
 * Show the first three principal components as red, green and blue. Encoders of one width share a basis, so that a
 * colour means the same in each.
 * @param {{features: Float32Array, width: number}[]} encoders
 * @returns {{colours: Uint8ClampedArray[], share: number, joint: boolean}} Colours (patches, 3) of each encoder; the
 *   share of the variance that the components explain, the smallest if there are several bases; whether there is one.
 */
export function principalColours(encoders) {
  const joint = new Set(encoders.map((e) => e.width)).size === 1;
  const groups = joint ? [encoders] : encoders.map((e) => [e]);
  const colours = [];
  let share = 1;
  for (const group of groups) {
    const { components, explained } = principalComponents(group);
    share = Math.min(share, explained);
    const [low, high] = [0.02, 0.98].map((q) => components.map((values) => quantile(values, q)));
    let row = 0;
    for (const { features, width } of group) {
      const patches = features.length / width;
      const rgb = new Uint8ClampedArray(3 * patches);
      for (let p = 0; p < patches; p++, row++) {
        for (let c = 0; c < 3; c++) {
          const scaled = (components[c][row] - low[c]) / Math.max(high[c] - low[c], LEAST);
          rgb[3 * p + c] = 255 * Math.min(Math.max(scaled, 0), 1);
        }
      }
      colours.push(rgb);
    }
  }
  return { colours, share, joint };
}

/** The q-quantile of values, interpolated linearly. */
function quantile(values, q) {
  const sorted = Float64Array.from(values).sort();
  const at = q * (sorted.length - 1);
  const below = Math.floor(at);
  return sorted[below] + (at - below) * (sorted[Math.min(below + 1, sorted.length - 1)] - sorted[below]);
}

/** The first three principal components of all rows of a group, and the share of the variance that they explain. */
function principalComponents(group) {
  const { width } = group[0];
  const rows = group.reduce((sum, e) => sum + e.features.length / width, 0);
  const data = new Float64Array(rows * width);
  let offset = 0;
  for (const { features } of group) {
    data.set(features, offset);
    offset += features.length;
  }
  const mean = new Float64Array(width);
  for (let i = 0; i < data.length; i++) mean[i % width] += data[i] / rows;
  let total = 0;
  for (let i = 0; i < data.length; i++) total += (data[i] -= mean[i % width]) ** 2;
  const { axes, values } = leadingAxes(data, rows, width);
  const components = axes.map((axis) => {
    const sign = axis.reduce((a, b) => a + b, 0) + LEAST < 0 ? -1 : 1; // the sign of an axis is arbitrary
    return Float64Array.from({ length: rows }, (_, row) => {
      let sum = 0;
      for (let i = 0; i < width; i++) sum += data[row * width + i] * axis[i];
      return sign * sum;
    });
  });
  return { components, explained: total ? values.reduce((a, b) => a + b, 0) / total : 1 };
}

/**
 * Find the three axes of largest variance by subspace iteration: a few vectors are multiplied by X^T X and made
 * orthonormal again until the variance along the first three no longer changes.
 */
function leadingAxes(data, rows, width) {
  const count = Math.min(8, width); // more than three converge faster
  let seed = 1; // the start is random, and the same each time
  const random = () => (seed = (Math.imul(seed, 1103515245) + 12345) & 0x7fffffff) / 0x7fffffff - 0.5;
  let axes = Array.from({ length: count }, () => Float64Array.from({ length: width }, random));
  let values = [];
  orthonormalise(axes);
  for (let round = 0, before = 0; round < 300; round++) {
    const images = axes.map((axis) => covarianceTimes(data, rows, width, axis));
    const small = axes.map((a) => images.map((b) => dot(a, b)));
    const { vectors, values: eigenvalues } = symmetricEigen(small);
    axes = vectors.map((v) => combine(v, images));
    values = eigenvalues.slice(0, 3);
    orthonormalise(axes);
    const sum = values.reduce((a, b) => a + b, 0);
    if (Math.abs(sum - before) <= 1e-13 * sum && round > 2) break;
    before = sum;
  }
  while (axes.length < 3) axes.push(new Float64Array(width));
  return { axes: axes.slice(0, 3), values };
}

function dot(a, b) {
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += a[i] * b[i];
  return sum;
}

function combine(weights, vectors) {
  const result = new Float64Array(vectors[0].length);
  vectors.forEach((vector, k) => {
    for (let i = 0; i < result.length; i++) result[i] += weights[k] * vector[i];
  });
  return result;
}

function covarianceTimes(data, rows, width, axis) {
  const result = new Float64Array(width);
  for (let row = 0; row < rows; row++) {
    const start = row * width;
    let sum = 0;
    for (let i = 0; i < width; i++) sum += data[start + i] * axis[i];
    for (let i = 0; i < width; i++) result[i] += sum * data[start + i];
  }
  return result;
}

function orthonormalise(vectors) {
  vectors.forEach((vector, k) => {
    for (let pass = 0; pass < 2; pass++) {
      for (const other of vectors.slice(0, k)) {
        const share = dot(vector, other);
        for (let i = 0; i < vector.length; i++) vector[i] -= share * other[i];
      }
    }
    const length = Math.sqrt(dot(vector, vector));
    for (let i = 0; i < vector.length; i++) vector[i] = length > LEAST ? vector[i] / length : 0;
  });
}

/** Eigenvectors and eigenvalues of a small symmetric matrix by Jacobi's rotations, the largest first. */
function symmetricEigen(matrix) {
  const n = matrix.length;
  const a = matrix.map((row) => [...row]);
  const v = a.map((_, i) => a.map((__, j) => Number(i === j))); // columns are the eigenvectors
  for (let sweep = 0; sweep < 30; sweep++) {
    let off = 0;
    for (let p = 0; p < n; p++) for (let q = p + 1; q < n; q++) off = Math.max(off, Math.abs(a[p][q]));
    if (off < 1e-300) break;
    for (let p = 0; p < n; p++) {
      for (let q = p + 1; q < n; q++) {
        if (a[p][q] === 0) continue;
        const theta = (a[q][q] - a[p][p]) / (2 * a[p][q]);
        const t = (theta < 0 ? -1 : 1) / (Math.abs(theta) + Math.sqrt(theta * theta + 1));
        const cos = 1 / Math.sqrt(t * t + 1);
        const sin = t * cos;
        for (let k = 0; k < n; k++) [a[k][p], a[k][q]] = [cos * a[k][p] - sin * a[k][q], sin * a[k][p] + cos * a[k][q]];
        for (let k = 0; k < n; k++) [a[p][k], a[q][k]] = [cos * a[p][k] - sin * a[q][k], sin * a[p][k] + cos * a[q][k]];
        for (let k = 0; k < n; k++) [v[k][p], v[k][q]] = [cos * v[k][p] - sin * v[k][q], sin * v[k][p] + cos * v[k][q]];
      }
    }
  }
  const order = a.map((_, i) => i).sort((i, j) => a[j][j] - a[i][i]);
  return { vectors: order.map((i) => v.map((row) => row[i])), values: order.map((i) => a[i][i]) };
}
