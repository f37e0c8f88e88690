// Runs the encoders in a thread of its own, so that the page stays usable meanwhile. ONNX Runtime Web computes on the
// graphics card through WebGPU where the browser has it, and otherwise on the processor.

import { patchGrid, principalColours } from "./features.js";

const OUTPUT = "last_hidden_state";
const sessions = {}; // by side: left, right
let runtime;

/** Load ONNX Runtime Web from a folder or another host, once. */
async function loadRuntime(address) {
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  const name = adapter ? "ort.webgpu.bundle.min.mjs" : "ort.wasm.bundle.min.mjs"; // the latter is half the size
  const ort = await import(new URL(name, address).href);
  ort.env.wasm.wasmPaths = address;
  // More threads need headers that not every host of a static page sends.
  ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(navigator.hardwareConcurrency, 4) : 1;
  ort.env.logLevel = "error";
  return { ort, devices: adapter ? ["webgpu", "wasm"] : ["wasm"] };
}

/** Make a session, and try it on an empty picture: what a graphics card cannot run is run on the processor. */
async function load({ side, address, bytes, weights, px }) {
  runtime ??= loadRuntime(address);
  const { ort, devices } = await runtime.catch((error) => {
    runtime = undefined; // so that the next visit to this function tries again
    throw coded("runtime", error);
  });
  await sessions[side]?.release();
  delete sessions[side];
  let failure;
  for (const device of devices) {
    let session;
    try {
      const options = { executionProviders: [device], logSeverityLevel: 3 }; // errors only
      if (weights) options.externalData = [{ path: "model.onnx_data", data: new Uint8Array(weights) }];
      session = await ort.InferenceSession.create(new Uint8Array(bytes), options);
      if (!session.outputNames.includes(OUTPUT)) throw coded("output", new Error(session.outputNames.join(", ")));
      if (session.inputNames.join() !== "pixel_values") throw coded("input", new Error(session.inputNames.join(", ")));
      const { tokens } = await run(ort, session, new Float32Array(3 * px * px), px);
      if (!patchGrid(tokens)) throw coded("grid", new Error(String(tokens)));
      sessions[side] = session;
      return { device };
    } catch (error) {
      await session?.release();
      failure = error;
      if (error.code) break; // the model itself is not one for this page
    }
  }
  if (!weights && /external|MountedFiles/i.test(failure.message)) throw coded("weights", failure);
  throw failure.code ? failure : coded("session", failure);
}

async function run(ort, session, pixels, px) {
  const output = (await session.run({ pixel_values: new ort.Tensor("float32", pixels, [1, 3, px, px]) }))[OUTPUT];
  if (output.dims.length !== 3) throw coded("grid", new Error(output.dims.join(" x ")));
  return { tokens: output.dims[1], width: output.dims[2], values: await output.getData() };
}

/** Encode a picture: patch features without CLS and registers. */
async function encode({ side, pixels, px }) {
  const { ort } = await runtime;
  const { tokens, width, values } = await run(ort, sessions[side], pixels, px);
  const { grid, prefix } = patchGrid(tokens);
  return { grid, width, features: Float32Array.from(values).slice(prefix * width) };
}

function coded(code, error) {
  return Object.assign(new Error(error.message), { code });
}

const tasks = { load, encode, colours: ({ encoders }) => principalColours(encoders) };
let last = Promise.resolve(); // ONNX Runtime Web runs one thing at a time

self.onmessage = ({ data: { id, task, values } }) => {
  last = last.then(async () => {
    try {
      self.postMessage({ id, result: await tasks[task](values) });
    } catch (error) {
      self.postMessage({ id, error: { code: error.code ?? "run", message: String(error.message ?? error) } });
    }
  });
};
