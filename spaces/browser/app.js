// The page: what the visitor chose, what is computed for it, and what is shown.

import { drawPanel, patchAt, patchBox, scaleColour, SCALE_CSS } from "./draw.js";
import { similarity } from "./features.js";
import { BUILT_IN, describe, download, downloadWeights, explain, FOR_PHOTOS, PageError } from "./models.js";
import { inputSide, prepare, seenPart } from "./preprocess.js";

const SIDES = ["left", "right"];
const PICTURES = [
  { file: "pictures/1.jpg", text: "An orange star and a yellow ring", spot: { x: 0.45, y: 0.3 } },
  { file: "pictures/2.jpg", text: "A light green square beside a dark green cross", spot: { x: 0.56, y: 0.8 } },
  { file: "pictures/3.jpg", text: "A dark red ring on a blue triangle", spot: { x: 0.2, y: 0.45 } },
  { file: "pictures/4.jpg", text: "Two triangles, two stars and a circle", spot: { x: 0.46, y: 0.85 } },
];
const SHOWN_PX = 720; // longer side of a canvas
const $ = (id) => document.getElementById(id);

const settings = await (await fetch("settings.json")).json();
const runtime = new URL(settings.runtime, document.baseURI).href;
const query = new URLSearchParams(location.search);
const state = {
  names: { left: query.get("left") ?? settings.left, right: query.get("right") ?? settings.right },
  show: query.get("show") === "colours" ? "colours" : "alike",
  picture: Math.min(Math.max(Number.parseInt(query.get("picture") ?? "1", 10) || 1, 1), PICTURES.length), // 0: own
  spot: readSpot(query.get("spot")),
};
const models = {}; // by side: name, loaded (a promise), aborter; once it is loaded, steps and device
let picture; // {file, shown: canvas, width, height}
let views = {}; // by side, of the picture: part, grid, width, features
let colours; // what principalColours returned for the views
let turn = 0; // counts what the visitor asked for, so that answers to something older are dropped

function readSpot(text) {
  const [x, y] = (text ?? "").split(",").map(Number);
  return text && x >= 0 && x <= 1 && y >= 0 && y <= 1 ? { x, y } : null;
}

// The worker answers each question by its number.
const worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
const waiting = new Map();
let questions = 0;
worker.onmessage = ({ data: { id, result, error } }) => {
  const { resolve, reject } = waiting.get(id);
  waiting.delete(id);
  if (error) reject(error);
  else resolve(result);
};
worker.onerror = (event) => {
  event.preventDefault();
  for (const { reject } of waiting.values()) reject({ code: "runtime", message: event.message });
  waiting.clear();
};
function ask(task, values, transfer = []) {
  return new Promise((resolve, reject) => {
    waiting.set(++questions, { resolve, reject });
    worker.postMessage({ id: questions, task, values }, transfer);
  });
}

/** Run a step for the visitor: mark the page as busy, and show what goes wrong. */
async function work(step) {
  const mine = ++turn;
  $("error").hidden = true;
  $("panels").setAttribute("aria-busy", "true");
  try {
    await step(() => mine === turn);
  } catch (error) {
    if (mine !== turn || error.name === "AbortError") return;
    if (!(error instanceof PageError)) console.warn(error);
    const text = error instanceof PageError ? error.message : "Something went wrong: reload the page and try again.";
    $("error").textContent = text;
    $("error").hidden = false;
    $("says").textContent = "";
    draw(); // what was shown before, if that is complete
  }
  if (mine === turn) $("panels").setAttribute("aria-busy", "false");
}

/** Start to load a side's model unless it is loaded or on its way; what was on its way before is given up. */
function loadModel(side) {
  const name = state.names[side];
  if (models[side]?.name === name) return models[side].loaded;
  models[side]?.aborter.abort();
  delete views[side];
  const model = { name, aborter: new AbortController() };
  models[side] = model;
  model.loaded = fetchAndStart(side, model).catch((error) => {
    if (models[side] === model) delete models[side]; // so that it can be tried again
    throw error;
  });
  return model.loaded;
}

async function fetchAndStart(side, model) {
  const { name, aborter } = model;
  let said = 0; // a screen reader could not follow more than one message a second
  const progress = (done, total) => {
    if (aborter.signal.aborted || performance.now() - said < 1000) return;
    said = performance.now();
    $("says").textContent = `Loading ${describe(name).title}: ${megabytes(done)} of ${megabytes(total)} MB`;
  };
  const { steps, bytes } = await download(name, settings.hub, progress, aborter.signal);
  const values = { side, address: runtime, px: inputSide(steps), bytes };
  let answer;
  if (!aborter.signal.aborted) $("says").textContent = `Starting ${describe(name).title} …`;
  try {
    answer = await ask("load", values);
  } catch (error) {
    if (error.code !== "weights") throw explain(name, error);
    const weights = await downloadWeights(name, settings.hub, progress, aborter.signal);
    answer = await ask("load", { ...values, weights }).catch((second) => {
      throw explain(name, second);
    });
  }
  Object.assign(model, { steps, device: answer.device });
}

const megabytes = (bytes) => (bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0);

async function openPicture(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    throw new PageError("This browser cannot open that file as a picture: try a JPEG or a PNG.");
  }
  const scale = SHOWN_PX / Math.max(bitmap.width, bitmap.height);
  const shown = document.createElement("canvas");
  shown.width = Math.max(Math.round(bitmap.width * scale), 1);
  shown.height = Math.max(Math.round(bitmap.height * scale), 1);
  const context = shown.getContext("2d");
  context.fillStyle = "white";
  context.fillRect(0, 0, shown.width, shown.height);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, shown.width, shown.height);
  const opened = { file, shown, width: bitmap.width, height: bitmap.height };
  bitmap.close();
  return opened;
}

/** Encode the picture with each model that has not seen it yet. */
async function encode(isCurrent) {
  const missing = SIDES.filter((side) => !views[side]);
  if (missing.length) {
    colours = undefined;
    $("says").textContent = "Looking at the picture …";
    // Without colour conversion, as Python reads the pixels.
    const bitmap = await createImageBitmap(picture.file, { colorSpaceConversion: "none" });
    for (const side of missing) {
      const { name, steps } = models[side];
      const px = inputSide(steps);
      const pixels = prepare(bitmap, steps);
      const encoded = await ask("encode", { side, pixels, px }, [pixels.buffer]).catch((error) => {
        throw explain(name, error);
      });
      if (!isCurrent()) return;
      views[side] = { ...encoded, part: seenPart(steps, picture) };
    }
    bitmap.close();
  }
  if (state.show === "colours" && !colours) {
    colours = await ask("colours", { encoders: SIDES.map((s) => ({ features: views[s].features, width: views[s].width })) });
  }
}

async function update(isCurrent) {
  const loads = SIDES.map(loadModel);
  for (const side of SIDES) if (!views[side]) drawPanel($(side), picture.shown, null);
  await Promise.all(loads);
  if (!isCurrent()) return;
  await encode(isCurrent);
  if (!isCurrent()) return;
  draw();
}

/** Open a picture, one of the page's or the visitor's, and compare the models on it. */
function choosePicture(number, file, spot) {
  return work(async (isCurrent) => {
    const blob = file ?? (await (await fetch(PICTURES[number - 1].file)).blob());
    const opened = await openPicture(blob);
    if (!isCurrent()) return;
    picture = opened;
    views = {};
    state.picture = number;
    state.spot = spot ?? PICTURES[number - 1]?.spot ?? { x: 0.5, y: 0.5 };
    $("panels").classList.toggle("wide", picture.width > 1.5 * picture.height);
    for (const side of SIDES) {
      $(side).width = picture.shown.width;
      $(side).height = picture.shown.height;
    }
    showChoices();
    await update(isCurrent);
  });
}

/** Compare what is on the page: titles, hints and the address follow the choices. */
function showChoices() {
  for (const side of SIDES) {
    const { title, about } = describe(state.names[side]);
    $(`title-${side}`).textContent = title;
    $(`about-${side}`).textContent = about;
    $(`name-${side}`).value = state.names[side];
  }
  document.querySelector(`[name=show][value=${state.show}]`).checked = true;
  $("lead-alike").hidden = state.show !== "alike";
  $("lead-colours").hidden = state.show !== "colours";
  [...$("pictures").children].forEach((button, i) => button.setAttribute("aria-pressed", String(i + 1 === state.picture)));
  const drawings = SIDES.filter((side) => Object.hasOwn(BUILT_IN, state.names[side]));
  $("hint").hidden = state.picture !== 0 || drawings.length === 0;
  writeAddress();
}

function writeAddress() {
  const { names, show, picture: number, spot } = state;
  const values = { left: names.left, right: names.right };
  if (show !== "alike") values.show = show;
  if (number) values.picture = number;
  if (number && spot) values.spot = `${spot.x.toFixed(3)},${spot.y.toFixed(3)}`;
  const queryString = new URLSearchParams(values).toString().replaceAll("%2F", "/").replaceAll("%2C", ",");
  history.replaceState(null, "", `?${queryString}`);
  // On the Hub, the page is a frame of the page that has the address.
  if (window.parent !== window) window.parent.postMessage({ queryString, hash: "" }, new URL(settings.hub).origin);
}

/** Draw both panels and say in words what they show. */
function draw() {
  if (!SIDES.every((side) => views[side])) return;
  const chosen = Object.fromEntries(SIDES.map((s) => [s, patchAt(views[s].part, views[s].grid, state.spot)]));
  const maps = Object.fromEntries(
    SIDES.map((s) => [s, similarity(views[s], chosen[s].row * views[s].grid + chosen[s].column)]),
  );
  const low = Math.min(...SIDES.map((s) => Math.min(...maps[s])));
  const strength = Number($("strength").value) / 100;
  SIDES.forEach((side, i) => {
    const { part, grid } = views[side];
    const patches = [...maps[side]].map((value, p) => {
      if (state.show === "colours") return { colour: colours.colours[i].slice(3 * p, 3 * p + 3), opacity: strength };
      const share = (value - low) / Math.max(1 - low, 1e-6);
      return { colour: scaleColour(share), opacity: strength ** (4 - 3 * share) }; // the picture shows where they differ
    });
    drawPanel($(side), picture.shown, { part, grid, patches, chosen: chosen[side] });
  });
  $("scale").hidden = state.show !== "alike";
  $("bar").style.background = SCALE_CSS;
  $("low").textContent = `different (${low.toFixed(2).replace("-", "−")})`;
  $("high").textContent = "same (1.00)";
  $("says").textContent = state.show === "alike" ? sayAlike(maps, chosen) : sayColours();
  $("basis").textContent = colours
    ? `Here these three hold ${Math.round(100 * colours.share)}% of what differs between the squares${colours.joint ? "" : " (of the model for which they hold less)"}.`
    : "";
  const onCard = SIDES.filter((side) => models[side].device === "webgpu");
  $("device").textContent = onCard.length ? "Computed on your graphics card." : "Computed on your processor.";
}

function sayAlike(maps, chosen) {
  const { row, column } = chosen.left;
  const { grid } = views.left;
  const place = `Row ${row + 1}, column ${column + 1} of ${grid}.`;
  if (views.right.grid !== grid || JSON.stringify(views.right.part) !== JSON.stringify(views.left.part)) {
    return `${place} The models cut the picture into different squares: ${grid} × ${grid} and ${views.right.grid} × ${views.right.grid}.`;
  }
  const gaps = [...maps.left].map((value, i) => Math.abs(value - maps.right[i]));
  const mean = gaps.reduce((a, b) => a + b, 0) / gaps.length;
  const worst = Math.max(...gaps);
  const at = gaps.indexOf(worst);
  if (worst < 0.005) return `${place} The models agree.`;
  const verdict = mean < 0.05 ? "The models hardly differ" : mean < 0.15 ? "The models differ a little" : "The models differ";
  return (
    `${place} ${verdict}: by ${mean.toFixed(2)} on average, by ${worst.toFixed(2)} at most ` +
    `(row ${Math.floor(at / grid) + 1}, column ${(at % grid) + 1}).`
  );
}

function sayColours() {
  return colours.joint
    ? "Both models share their colours: the same colour means alike, also across the two."
    : "Each model has its own colours: compare shapes, not colours.";
}

function moveTo(spot) {
  if (!SIDES.every((side) => views[side])) return;
  state.spot = spot;
  draw();
  writeAddress();
}

const STEPS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
for (const side of SIDES) {
  $(side).addEventListener("click", (event) => {
    const box = $(side).getBoundingClientRect();
    moveTo({ x: (event.clientX - box.left) / box.width, y: (event.clientY - box.top) / box.height });
  });
  $(side).addEventListener("keydown", (event) => {
    const step = STEPS[event.key];
    if (!step || !views[side]) return;
    event.preventDefault();
    const { part, grid } = views[side];
    const { row, column } = patchAt(part, grid, state.spot);
    const inside = (value) => Math.min(Math.max(value, 0), grid - 1);
    const { x, y, width, height } = patchBox(part, grid, inside(row + step[0]), inside(column + step[1]));
    moveTo({ x: x + width / 2, y: y + height / 2 });
  });
}

PICTURES.forEach(({ file, text }, i) => {
  const button = document.createElement("button");
  button.type = "button";
  const image = document.createElement("img");
  image.src = file;
  image.alt = text;
  button.append(image);
  button.addEventListener("click", () => choosePicture(i + 1));
  $("pictures").append(button);
});
for (const name of [...Object.keys(BUILT_IN), ...Object.values(FOR_PHOTOS)]) $("names").append(new Option(name, name));

const useFile = (file) => file && choosePicture(0, file);
$("file").addEventListener("change", () => {
  useFile($("file").files[0]);
  $("file").value = ""; // so that the same file can be chosen again
});
document.addEventListener("paste", (event) => useFile(event.clipboardData?.files[0]));
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  $("panels").classList.add("dropping");
});
document.addEventListener("dragleave", () => $("panels").classList.remove("dropping"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  $("panels").classList.remove("dropping");
  useFile(event.dataTransfer?.files[0]);
});
$("show").addEventListener("change", (event) => {
  state.show = event.target.value;
  showChoices();
  work(update);
});
$("strength").addEventListener("input", draw);
function chooseModels(names) {
  state.names = names;
  showChoices();
  work(update);
}
$("models").addEventListener("submit", (event) => {
  event.preventDefault();
  chooseModels(Object.fromEntries(SIDES.map((side) => [side, $(`name-${side}`).value.trim()])));
});
$("for-photos").addEventListener("click", () => {
  chooseModels({ ...FOR_PHOTOS });
  $("left").focus(); // the button is gone
});

await choosePicture(state.picture, undefined, state.spot);
