// Interactions inside the panels. Clicks on patches and examples become Gradio events; the rest needs no server.
const choosePatch = (row, column) => trigger("select", { row, column });

element.addEventListener("input", (event) => {
  if (!event.target.matches(".divider")) return;
  event.target.closest(".swipe").style.setProperty("--divider", `${event.target.value}%`);
});

element.addEventListener("click", (event) => {
  const example = event.target.closest(".gallery button");
  if (example) trigger("select", { index: Number(example.dataset.index) });
  const grid = event.target.closest(".patch-grid");
  if (!grid) return;
  const box = grid.getBoundingClientRect();
  const { rows, columns } = grid.dataset;
  const row = Math.floor(((event.clientY - box.top) / box.height) * rows);
  const column = Math.floor(((event.clientX - box.left) / box.width) * columns);
  choosePatch(Math.min(Math.max(row, 0), rows - 1), Math.min(Math.max(column, 0), columns - 1));
});

let restoreFocus = false; // the panel is rendered again after each key, and loses the focus
element.addEventListener("keydown", (event) => {
  const grid = event.target.closest(".patch-grid");
  const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
  if (!grid || !step) return;
  event.preventDefault();
  restoreFocus = true;
  const { rows, columns, row, column } = grid.dataset;
  const next = [Number(row) + step[0], Number(column) + step[1]];
  choosePatch(Math.min(Math.max(next[0], 0), rows - 1), Math.min(Math.max(next[1], 0), columns - 1));
});
watch("value", () => {
  if (restoreFocus) element.querySelector(".patch-grid")?.focus({ preventScroll: true });
  restoreFocus = false;
});
