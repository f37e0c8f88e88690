// Interactions inside the panels of the mode for any two encoders: clicks and keys become Gradio events.
let focused = null; // the panel is rendered again after each event, and loses the focus
let scrolled = []; // and the places to which the rows of thumbnails were scrolled
const choose = (choice, keep) => {
  focused = keep ?? null;
  scrolled = [...element.querySelectorAll(".thumbnails")].map((row) => row.scrollLeft);
  trigger("select", choice);
};
const within = (number, end) => Math.min(Math.max(number, 0), end - 1);
const choosePatch = (grid, row, column) => {
  const { encoder, rows, columns, focus } = grid.dataset;
  choose({ encoder: Number(encoder), row: within(row, rows), column: within(column, columns) }, focus);
};

element.addEventListener("click", (event) => {
  const thumbnail = event.target.closest(".thumbnails button");
  if (thumbnail) {
    const encoder = Number(thumbnail.closest(".layer-choice").dataset.encoder);
    choose({ encoder, layer: Number(thumbnail.dataset.layer) }, `layer-${encoder}`);
    return;
  }
  const grid = event.target.closest(".patch-grid");
  if (!grid) return;
  const box = grid.getBoundingClientRect();
  const row = Math.floor(((event.clientY - box.top) / box.height) * grid.dataset.rows);
  const column = Math.floor(((event.clientX - box.left) / box.width) * grid.dataset.columns);
  choosePatch(grid, row, column);
});

element.addEventListener("input", (event) => {
  if (!event.target.matches(".layer-slider")) return;
  const label = event.target.dataset.labels.split(" ")[Number(event.target.value)];
  event.target.closest("label").querySelector("output").value = label;
  event.target.setAttribute("aria-valuetext", label);
});

element.addEventListener("change", (event) => {
  if (!event.target.matches(".layer-slider")) return;
  const encoder = Number(event.target.closest(".layer-choice").dataset.encoder);
  choose({ encoder, layer: Number(event.target.value) }, event.target.dataset.focus);
});

element.addEventListener("keydown", (event) => {
  const grid = event.target.closest(".patch-grid");
  const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
  if (!grid || !step) return;
  event.preventDefault();
  choosePatch(grid, Number(grid.dataset.row) + step[0], Number(grid.dataset.column) + step[1]);
});

// Scroll each row of thumbnails back to where it was, or to the layer that is shown.
const reveal = () => {
  [...element.querySelectorAll(".thumbnails")].forEach((row, i) => {
    row.scrollLeft = scrolled[i] ?? 0;
    const chosen = row.querySelector("[aria-pressed=true]");
    if (!chosen) return;
    const { offsetLeft, offsetWidth } = chosen;
    if (offsetLeft < row.scrollLeft || offsetLeft + offsetWidth > row.scrollLeft + row.clientWidth)
      row.scrollLeft = offsetLeft - (row.clientWidth - offsetWidth) / 2;
  });
};
watch("value", () => {
  if (focused) element.querySelector(`[data-focus="${focused}"]`)?.focus({ preventScroll: true });
  focused = null;
  requestAnimationFrame(reveal);
});
requestAnimationFrame(reveal);
