// Two images on top of each other under a slider. The slider is an input, so the arrow keys move it too.

import { element } from "./dom.js";

/** Both images as one element; `names` are shown in its corners. */
export function comparison(urls, names, size) {
  const images = urls.map((url, index) => element("img", { src: url, alt: `Made by ${names[index]}`, draggable: "false" }));
  const slider = element("input", { type: "range", min: "0", max: "100", step: "0.5", value: "50",
                                    "aria-label": `How much is shown of ${names[0]} over ${names[1]}` });
  const whole = element("div", { class: "comparison" }, images[1], element("div", { class: "over" }, images[0]), slider,
                        element("div", { class: "edge" }), element("span", { class: "side first" }, names[0]),
                        element("span", { class: "side second" }, names[1]));
  whole.style.aspectRatio = `${size.width} / ${size.height}`;
  const move = share => {
    const at = Math.min(Math.max(share, 0), 100);
    slider.value = String(at);
    slider.setAttribute("aria-valuetext", `${Math.round(at)} % ${names[0]}`);
    whole.style.setProperty("--at", `${at}%`);
  };
  const toPointer = event => {
    const box = whole.getBoundingClientRect();
    move(100 * (event.clientX - box.left) / box.width);
  };
  slider.addEventListener("input", () => move(Number(slider.value)));
  // A range input answers to clicks by its thumb's width, which would not be where the edge is.
  slider.addEventListener("pointerdown", event => {
    slider.setPointerCapture(event.pointerId);
    toPointer(event);
    slider.focus();
    event.preventDefault();
  });
  slider.addEventListener("pointermove", event => { if (slider.hasPointerCapture(event.pointerId)) toPointer(event); });
  move(50);
  return whole;
}
