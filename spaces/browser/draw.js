// Pictures under maps, on canvases.

// viridis of matplotlib at equal steps: colour-blind people can read it, and it gets lighter towards the top.
const VIRIDIS = [
  [68, 1, 84], [72, 23, 105], [71, 42, 122], [67, 61, 132], [61, 78, 138], [53, 94, 141], [46, 109, 142],
  [41, 123, 142], [35, 137, 142], [31, 151, 139], [33, 165, 133], [46, 179, 124], [70, 192, 111], [101, 203, 94],
  [137, 213, 72], [176, 221, 47], [216, 226, 25], [253, 231, 37],
];

/** Colour of a share from 0 to 1. */
export function scaleColour(share) {
  const at = Math.min(Math.max(share, 0), 1) * (VIRIDIS.length - 1);
  const below = Math.min(Math.floor(at), VIRIDIS.length - 2);
  return VIRIDIS[below].map((from, i) => Math.round(from + (at - below) * (VIRIDIS[below + 1][i] - from)));
}

/** The colour scale as a CSS gradient. */
export const SCALE_CSS = `linear-gradient(90deg, ${VIRIDIS.map((c) => `rgb(${c})`).join(", ")})`;

/** Position of a patch in shares of the picture. */
export function patchBox(part, grid, row, column) {
  const [width, height] = [part.width / grid, part.height / grid];
  return { x: part.x + column * width, y: part.y + row * height, width, height };
}

/** The patch under a point of the picture, or the nearest one. */
export function patchAt(part, grid, point) {
  const place = (share) => Math.min(Math.max(Math.floor(share * grid), 0), grid - 1);
  return { row: place((point.y - part.y) / part.height), column: place((point.x - part.x) / part.width) };
}

/**
 * Draw a picture, a colour on each patch, and a frame around the chosen patch.
 * @param {HTMLCanvasElement} canvas
 * @param {CanvasImageSource} picture
 * @param {{part: object, grid: number, patches: {colour: number[], opacity: number}[], chosen: object} | null} map The
 *   part of the picture that has patches, their number in each direction, and row and column of the chosen one.
 */
export function drawPanel(canvas, picture, map) {
  const context = canvas.getContext("2d");
  context.clearRect(0, 0, canvas.width, canvas.height);
  context.drawImage(picture, 0, 0, canvas.width, canvas.height);
  if (!map) return;
  const { part, grid, patches, chosen } = map;
  const toPixels = (box) => {
    // Rounded edges, so that neighbouring patches neither overlap nor leave a gap.
    const [left, top] = [Math.round(box.x * canvas.width), Math.round(box.y * canvas.height)];
    const right = Math.round((box.x + box.width) * canvas.width);
    return [left, top, right - left, Math.round((box.y + box.height) * canvas.height) - top];
  };
  context.save();
  context.fillStyle = "rgb(0 0 0 / 0.6)"; // what the model is not given
  context.beginPath();
  context.rect(0, 0, canvas.width, canvas.height);
  context.rect(...toPixels(part));
  context.fill("evenodd");
  context.restore();
  patches.forEach(({ colour: [red, green, blue], opacity }, i) => {
    context.fillStyle = `rgb(${red} ${green} ${blue} / ${opacity})`;
    context.fillRect(...toPixels(patchBox(part, grid, Math.floor(i / grid), i % grid)));
  });
  const [x, y, width, height] = toPixels(patchBox(part, grid, chosen.row, chosen.column));
  const line = Math.max(canvas.width / 160, 2);
  for (const [colour, thickness] of [["black", 3 * line], ["white", 1.5 * line]]) {
    context.strokeStyle = colour;
    context.lineWidth = thickness;
    context.strokeRect(x, y, width, height);
  }
}
