// The encoders that a visitor can choose: the two that come with the page, and any on the Hub that was exported to ONNX.

import { readSteps } from "./preprocess.js";

export const BUILT_IN = {
  "shapes-sft": { title: "SFT", about: "learned by copying good answers" },
  "shapes-dpo": { title: "DPO", about: "learned by choosing between two answers" },
};
// Small encoders of photos that others exported and published: DINOv2 and DINOv3, 90 MB each.
export const FOR_PHOTOS = {
  left: "onnx-community/dinov2-small",
  right: "onnx-community/dinov3-vits16-pretrain-lvd1689m-ONNX",
};
const HUB_NAME = /^\w[\w.-]*\/\w[\w.-]*$/;
const MOST_BYTES = 1.9e9; // of a model: a browser's buffers end at 2 GB

/** An error whose message is a sentence for the visitor. */
export class PageError extends Error {}

/** Title and explanation of a model. */
export const describe = (name) => (Object.hasOwn(BUILT_IN, name) ? BUILT_IN[name] : { title: name, about: "" });

/** Address of a model's folder. */
function folderOf(name, hub) {
  if (Object.hasOwn(BUILT_IN, name)) return new URL(`models/${name}/`, import.meta.url).href;
  if (HUB_NAME.test(name)) return `${hub}/${name}/resolve/main/`;
  throw new PageError(`“${name}” is not a model's name: write owner/name, as on the Hub.`);
}

async function request(name, file, hub, signal) {
  const host = new URL(hub).host;
  let response;
  try {
    response = await fetch(folderOf(name, hub) + file, { signal });
  } catch (error) {
    if (error.name === "AbortError" || error instanceof PageError) throw error;
    throw new PageError(`${host} does not answer: check your connection and try again.`);
  }
  if (response.ok) return response;
  const code = response.headers.get("X-Error-Code");
  if (response.status === 403 || code === "GatedRepo") {
    throw new PageError(`${name} is open only to people who accepted its terms, so this page cannot read it.`);
  }
  if (response.status === 401 || code === "RepoNotFound") throw new PageError(`There is no public model ${name} on ${host}.`);
  if (response.status !== 404) throw new PageError(`${host} answers ${response.status} for ${name}: try again later.`);
  if (file === "onnx/model.onnx") {
    throw new PageError(`${name} has no onnx/model.onnx; its owner can add it with “pivot push --also onnx”.`);
  }
  throw new PageError(`${name} has no ${file}, which this page needs.`);
}

async function bytesOf(name, response, progress) {
  const total = Number(response.headers.get("Content-Length"));
  const tooLarge = (bytes) => new PageError(`${name} has ${(bytes / 1e9).toFixed(1)} GB, more than a browser can hold.`);
  if (total > MOST_BYTES) throw tooLarge(total);
  const parts = [];
  let size = 0;
  for (const reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    parts.push(value);
    if ((size += value.length) > MOST_BYTES) throw tooLarge(size);
    progress(size, Math.max(total, size));
  }
  return new Blob(parts).arrayBuffer();
}

/**
 * Download a model.
 * @param {string} name Name of a built-in model, or owner/name on the Hub.
 * @param {string} hub Address of the Hub.
 * @param {(done: number, total: number) => void} progress Is called with bytes.
 * @returns {Promise<{steps: object, bytes: ArrayBuffer}>} How it prepares pictures, and its ONNX file.
 * @throws {PageError} The model cannot be used here.
 */
export async function download(name, hub, progress, signal) {
  const config = await request(name, "preprocessor_config.json", hub, signal);
  let steps;
  try {
    steps = readSteps(await config.json());
  } catch (error) {
    throw new PageError(`${name} prepares pictures in a way this page does not know: ${error.message}.`);
  }
  return { steps, bytes: await bytesOf(name, await request(name, "onnx/model.onnx", hub, signal), progress) };
}

/** Download the weights that a model keeps beside its ONNX file. */
export async function downloadWeights(name, hub, progress, signal) {
  return bytesOf(name, await request(name, "onnx/model.onnx_data", hub, signal), progress);
}

/** Say in one sentence why the worker refused a model. */
export function explain(name, { code, message }) {
  const reasons = {
    runtime: `The part that runs models could not be loaded: check your connection and reload the page.`,
    input: `${name} needs more than a picture (${message}), so this page cannot run it.`,
    output: `${name} returns ${message} and no last_hidden_state, so it has no patches to compare.`,
    grid: `${name} does not return a square of patches (${message}), so this page cannot draw it.`,
    session: `This browser cannot run ${name}: ${firstLine(message)}`,
    run: `${name} stopped with an error: ${firstLine(message)}`,
  };
  return new PageError(reasons[code] ?? reasons.run);
}

function firstLine(message) {
  const line = message.split("\n")[0].slice(0, 160);
  return /[.!]$/.test(line) ? line : `${line}.`;
}
