// What happens inside the panels without asking the server; clicks on patches and examples become Gradio events.
const pick = (row, column) => trigger("select", { row, column });

element.addEventListener("input", (event) => {
  if (!event.target.matches(".cut")) return;
  event.target.closest(".swipe").style.setProperty("--cut", `${event.target.value}%`);
});

element.addEventListener("click", (event) => {
  const example = event.target.closest(".gallery button");
  if (example) trigger("select", { index: Number(example.dataset.index) });
  const grid = event.target.closest(".pick");
  if (!grid) return;
  const box = grid.getBoundingClientRect();
  const { rows, columns } = grid.dataset;
  const row = Math.floor(((event.clientY - box.top) / box.height) * rows);
  const column = Math.floor(((event.clientX - box.left) / box.width) * columns);
  pick(Math.min(Math.max(row, 0), rows - 1), Math.min(Math.max(column, 0), columns - 1));
});

let moving = false; // the panels are drawn anew after each move: the focus goes back to where it was
element.addEventListener("keydown", (event) => {
  const grid = event.target.closest(".pick");
  const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
  if (!grid || !step) return;
  event.preventDefault();
  moving = true;
  const { rows, columns, row, column } = grid.dataset;
  const next = [Number(row) + step[0], Number(column) + step[1]];
  pick(Math.min(Math.max(next[0], 0), rows - 1), Math.min(Math.max(next[1], 0), columns - 1));
});
watch("value", () => {
  if (moving) element.querySelector(".pick")?.focus({ preventScroll: true });
  moving = false;
});
