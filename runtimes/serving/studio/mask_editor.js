// Painting a mask over an image, in a dialog. Strokes are remembered, not pixels: undo paints all but the last again.

import { announce, byId } from "./dom.js";

const OVERLAY = getComputedStyle(document.documentElement).getPropertyValue("--mask").trim().split(/\s+/).join(",");
const PAINT = `rgb(${OVERLAY})`;
const canvas = byId("mask-canvas");
const dialog = byId("mask-dialog");
const pen = canvas.getContext("2d", { willReadFrequently: true });
let strokes = [], undone = [], erasing = false, stroke = null, cursor = null, finish = () => {};

/** Let the user paint. `image` is a canvas, `before` the strokes of an earlier mask over it.
 *
 * Resolves to `{strokes, mask}`, `mask` a PNG of the image's size that is transparent where it is painted, or null
 * where nothing is; to null when the dialog is closed without a change.
 */
export function paintMask(image, before) {
  for (const sheet of [canvas, byId("mask-base")]) Object.assign(sheet, { width: image.width, height: image.height });
  byId("mask-base").getContext("2d").drawImage(image, 0, 0);
  strokes = [...before];
  undone = [];
  stroke = null;
  cursor = { x: image.width / 2, y: image.height / 2 };
  useTool(false);
  dialog.showModal();
  fit();
  repaint();
  canvas.focus();
  return new Promise(resolve => {
    finish = async used => {
      finish = () => {};
      dialog.close();
      resolve(used ? { strokes, mask: await written() } : null);
    };
  });
}

/** The mask that the strokes make. A pixel is painted or not: what is transparent in part would not count as painted. */
async function written() {
  const pixels = pen.getImageData(0, 0, canvas.width, canvas.height);
  let painted = false;
  for (let at = 3; at < pixels.data.length; at += 4) {
    const here = pixels.data[at] >= 128;
    painted ||= here;
    pixels.data[at] = here ? 0 : 255;
  }
  if (!painted) return null;
  const sheet = new OffscreenCanvas(canvas.width, canvas.height);
  sheet.getContext("2d").putImageData(pixels, 0, 0);
  return sheet.convertToBlob({ type: "image/png" });
}

function fit() {
  const area = byId("mask-area");
  const style = getComputedStyle(area);
  const wide = area.clientWidth - 2 * parseFloat(style.paddingLeft);
  const high = Math.max(window.innerHeight - 250, 200);
  const scale = Math.min(wide / canvas.width, high / canvas.height);
  byId("mask-sheet").style.width = `${Math.floor(canvas.width * scale)}px`;
  byId("mask-sheet").style.height = `${Math.floor(canvas.height * scale)}px`;
  showBrush();
}

/** Diameter of the brush in pixels of the image: the slider goes up to half of its shorter side. */
function brushSize() {
  return Math.max(Math.min(canvas.width, canvas.height) * Number(byId("brush-size").value) / 200, 1);
}

function useTool(erase) {
  erasing = erase;
  byId("tool-paint").setAttribute("aria-pressed", String(!erase));
  byId("tool-erase").setAttribute("aria-pressed", String(erase));
}

// ---- strokes

function repaint() {
  pen.clearRect(0, 0, canvas.width, canvas.height);
  for (const made of strokes) draw(made);
  byId("mask-undo").disabled = !strokes.length;
  byId("mask-redo").disabled = !undone.length;
}

function draw(made, from = 0) {
  if (made.kind === "clear") return pen.clearRect(0, 0, canvas.width, canvas.height);
  pen.fillStyle = pen.strokeStyle = PAINT;
  if (made.kind === "invert") {
    pen.globalCompositeOperation = "source-out";
    pen.fillRect(0, 0, canvas.width, canvas.height);
  } else {
    pen.globalCompositeOperation = made.erase ? "destination-out" : "source-over";
    pen.lineWidth = made.size;
    pen.lineCap = pen.lineJoin = "round";
    const [first, ...others] = made.points.slice(Math.max(from - 1, 0));
    pen.beginPath();
    pen.arc(first.x, first.y, made.size / 2, 0, 2 * Math.PI); // a touch without a move is a dot
    pen.fill();
    pen.beginPath();
    pen.moveTo(first.x, first.y);
    for (const point of others) pen.lineTo(point.x, point.y);
    pen.stroke();
  }
  pen.globalCompositeOperation = "source-over";
}

function add(made) {
  strokes.push(made);
  undone = [];
  repaint();
}

function undo() {
  if (!strokes.length) return;
  undone.push(strokes.pop());
  repaint();
  announce("Undone");
}

function redo() {
  if (!undone.length) return;
  strokes.push(undone.pop());
  repaint();
  announce("Done again");
}

// ---- pointer and keys

function placeOf(event) {
  const box = canvas.getBoundingClientRect();
  return { x: (event.clientX - box.left) * canvas.width / box.width, y: (event.clientY - box.top) * canvas.height / box.height };
}

function showBrush() {
  const brush = byId("brush");
  const scale = canvas.clientWidth / canvas.width;
  brush.style.left = `${cursor.x * scale}px`;
  brush.style.top = `${cursor.y * scale}px`;
  brush.style.width = brush.style.height = `${brushSize() * scale}px`;
}

canvas.addEventListener("pointerdown", event => {
  if (event.button !== 0 || stroke) return;
  event.preventDefault();
  canvas.focus({ preventScroll: true });
  canvas.setPointerCapture(event.pointerId);
  cursor = placeOf(event);
  stroke = { kind: "line", erase: erasing, size: brushSize(), points: [cursor], pointer: event.pointerId };
  draw(stroke);
});
canvas.addEventListener("pointermove", event => {
  cursor = placeOf(event);
  byId("brush").hidden = false;
  showBrush();
  if (!stroke || stroke.pointer !== event.pointerId) return;
  const from = stroke.points.length;
  stroke.points.push(...(event.getCoalescedEvents?.().map(placeOf) ?? []), cursor);
  draw(stroke, from);
});
for (const name of ["pointerup", "pointercancel"]) {
  canvas.addEventListener(name, event => {
    if (!stroke || stroke.pointer !== event.pointerId) return;
    const { pointer, ...made } = stroke;
    stroke = null;
    add(made);
  });
}
canvas.addEventListener("pointerleave", () => { if (!canvas.matches(":focus-visible")) byId("brush").hidden = true; });
canvas.addEventListener("focus", () => { byId("brush").hidden = false; showBrush(); });
canvas.addEventListener("blur", () => { byId("brush").hidden = true; });

canvas.addEventListener("keydown", event => {
  const far = brushSize() * (event.shiftKey ? 2 : 0.5);
  const moves = { ArrowLeft: [-far, 0], ArrowRight: [far, 0], ArrowUp: [0, -far], ArrowDown: [0, far] };
  if (event.key in moves) {
    const [x, y] = moves[event.key];
    cursor = { x: Math.min(Math.max(cursor.x + x, 0), canvas.width), y: Math.min(Math.max(cursor.y + y, 0), canvas.height) };
    byId("brush").hidden = false;
    showBrush();
  } else if (event.key === " ") {
    add({ kind: "line", erase: erasing, size: brushSize(), points: [cursor] });
  } else return;
  event.preventDefault();
});
dialog.addEventListener("keydown", event => {
  const size = byId("brush-size");
  if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "z") {
    if (event.shiftKey) redo(); else undo();
  } else if (event.ctrlKey || event.metaKey || event.altKey) return;
  else if (event.key === "[" || event.key === "]") {
    size.value = String(Number(size.value) + (event.key === "]" ? 5 : -5));
    showBrush();
  } else if (event.key === "b" || event.key === "e") useTool(event.key === "e");
  else return;
  event.preventDefault();
});

byId("tool-paint").addEventListener("click", () => useTool(false));
byId("tool-erase").addEventListener("click", () => useTool(true));
byId("brush-size").addEventListener("input", showBrush);
byId("mask-undo").addEventListener("click", undo);
byId("mask-redo").addEventListener("click", redo);
byId("mask-invert").addEventListener("click", () => add({ kind: "invert" }));
byId("mask-clear").addEventListener("click", () => add({ kind: "clear" }));
byId("mask-done").addEventListener("click", () => finish(true));
byId("mask-close").addEventListener("click", () => finish(false));
dialog.addEventListener("cancel", event => { event.preventDefault(); finish(false); });
window.addEventListener("resize", () => { if (dialog.open) fit(); });
