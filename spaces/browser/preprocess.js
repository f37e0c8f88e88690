// From a picture to an encoder's input, as the encoder's image processor in Python does it.

import { KERNELS, resize } from "./resize.js";

const MOST_PX = 2048; // side of an encoder's input

/**
 * Read preprocessor_config.json.
 * @param {object} config Its content.
 * @returns {object} The steps: size, crop ({height, width} or null), kernel, scale, mean, std.
 * @throws {Error} The file asks for a step that this page does not know; the message is a part of a sentence.
 */
export function readSteps(config) {
  const crop = config.do_center_crop ? square(config.crop_size ?? config.size, "crop_size") : null;
  const size = config.do_resize === false ? null : readSize(config.size, crop !== null);
  if (config.do_pad) throw new Error("pictures are padded (do_pad)");
  if (!crop && !size?.height) throw new Error(`the size is ${JSON.stringify(config.size)}`);
  const kernel = KERNELS[config.resample ?? 2];
  if (!kernel) throw new Error(`resample is ${config.resample}`);
  return {
    crop,
    size,
    kernel,
    scale: config.do_rescale === false ? 1 : config.rescale_factor ?? 1 / 255,
    mean: config.do_normalize === false ? [0, 0, 0] : channels(config.image_mean, "image_mean"),
    std: config.do_normalize === false ? [1, 1, 1] : channels(config.image_std, "image_std"),
  };
}

function readSize(size, cropped) {
  if (Number.isInteger(size)) size = cropped ? { shortest_edge: size } : { height: size, width: size };
  const keys = Object.keys(size ?? {}).filter((key) => size[key] !== null);
  if (keys.length === 1 && keys[0] === "shortest_edge") return { shortest_edge: side(size.shortest_edge, "size") };
  return square(size, "size");
}

function square(size, key) {
  if (Number.isInteger(size)) size = { height: size, width: size };
  const { height, width } = size ?? {};
  if (height === undefined || height !== width) throw new Error(`${key} is ${JSON.stringify(size)}`);
  return { height: side(height, key), width: side(width, key) };
}

function side(px, key) {
  if (!Number.isInteger(px) || px < 1 || px > MOST_PX) throw new Error(`${key} is ${JSON.stringify(px)}`);
  return px;
}

function channels(values, key) {
  if (typeof values === "number") values = [values, values, values];
  if (values?.length !== 3 || !values.every(Number.isFinite)) throw new Error(`${key} is ${JSON.stringify(values)}`);
  return values;
}

/** Side of the encoder's input in pixels. */
export const inputSide = (steps) => (steps.crop ?? steps.size).height;

/** Size of a picture before the crop. */
function resizedSize({ size }, { width, height }) {
  if (!size) return { width, height };
  if (size.height) return size;
  const long = Math.trunc((size.shortest_edge * Math.max(width, height)) / Math.min(width, height));
  return width <= height ? { width: size.shortest_edge, height: long } : { width: long, height: size.shortest_edge };
}

/**
 * Find the part of a picture that the encoder is given.
 * @returns {{x: number, y: number, width: number, height: number}} In shares of the picture's width and height.
 */
export function seenPart(steps, picture) {
  if (!steps.crop) return { x: 0, y: 0, width: 1, height: 1 };
  const { width, height } = resizedSize(steps, picture);
  const [left, top] = [Math.floor((width - steps.crop.width) / 2), Math.floor((height - steps.crop.height) / 2)];
  return { x: left / width, y: top / height, width: steps.crop.width / width, height: steps.crop.height / height };
}

/**
 * Prepare a picture for an encoder.
 * @param {ImageBitmap} bitmap The picture.
 * @param {object} steps What `readSteps` returned.
 * @returns {Float32Array} pixel_values (3, side, side).
 */
export function prepare(bitmap, steps) {
  const { width, height } = resizedSize(steps, bitmap);
  const pixels = resize(rowReader(bitmap), bitmap, { width, height }, steps.kernel);
  const px = inputSide(steps);
  const [left, top] = [Math.floor((width - px) / 2), Math.floor((height - px) / 2)]; // below zero: black around it
  const values = new Float32Array(3 * px * px);
  for (let channel = 0; channel < 3; channel++) {
    const table = normalised(steps, channel);
    for (let y = 0; y < px; y++) {
      for (let x = 0; x < px; x++) {
        const [column, row] = steps.crop ? [x + left, y + top] : [x, y];
        const inside = column >= 0 && column < width && row >= 0 && row < height;
        values[(channel * px + y) * px + x] = table[inside ? pixels[3 * (row * width + column) + channel] : 0];
      }
    }
  }
  return values;
}

/** The input's value for each byte of a channel, rounded to 32 bits at the same places as in Python. */
function normalised({ scale, mean, std }, channel) {
  const [centre, spread] = [Math.fround(mean[channel]), Math.fround(std[channel])];
  return Float32Array.from({ length: 256 }, (_, byte) => Math.fround(Math.fround(byte * scale) - centre) / spread);
}

/** A function that reads rows of a picture as RGBA, with white where it is transparent. */
function rowReader(bitmap) {
  return (top, rows) => {
    const context = new OffscreenCanvas(bitmap.width, rows).getContext("2d", { willReadFrequently: true });
    context.fillStyle = "white";
    context.fillRect(0, 0, bitmap.width, rows);
    context.drawImage(bitmap, 0, -top);
    return context.getImageData(0, 0, bitmap.width, rows).data;
  };
}
