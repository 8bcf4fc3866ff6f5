// Small helpers over the document. Text goes in as text: nothing of a prompt or an answer is ever read as HTML.

export const byId = id => document.getElementById(id);

/** An element with properties (`class`, `dataset`, `on…` and attributes among them) and children. */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name === "class") made.className = value;
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

/** One of the icons at the head of index.html. */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

/** A copy of the one element of a `<template>`. */
export const copyOf = id => byId(id).content.firstElementChild.cloneNode(true);

/** Say something to screen readers. */
export function announce(text) {
  byId("announcer").textContent = text;
}

/** A short message that leaves by itself, with something to do about it where there is. */
export function toast(text, action = "", perform = () => {}) {
  const shown = element("div", { class: "toast" }, element("span", {}, text));
  const leave = () => shown.remove();
  if (action) shown.append(element("button", { type: "button", onclick: () => { leave(); perform(); } }, action));
  byId("toasts").replaceChildren(shown);
  setTimeout(leave, action ? 8000 : 4000);
}

/** Put text on the clipboard and say so; where the browser does not let a page do that, show it for copying by hand. */
export async function copyText(text, done) {
  try {
    await navigator.clipboard.writeText(text);
    toast(done);
  } catch {
    window.prompt("Copy:", text);
  }
}

/** Ask before something that cannot be undone: resolves to whether it is wanted. */
export function confirmed(title, text, yes) {
  const dialog = byId("confirm-dialog");
  byId("confirm-title").textContent = title;
  byId("confirm-text").textContent = text;
  byId("confirm-yes").textContent = yes;
  dialog.showModal();
  return new Promise(resolve => {
    const end = answer => { dialog.onclose = null; dialog.close(); resolve(answer); };
    byId("confirm-yes").onclick = () => end(true);
    byId("confirm-no").onclick = () => end(false);
    dialog.onclose = () => end(false);
  });
}

export const sha256 = async blob => {
  // Plain http on another host than this one has no crypto.subtle: any name that is not taken does as well.
  if (!crypto.subtle) return Array.from(crypto.getRandomValues(new Uint8Array(32)), hexadecimal).join("");
  return Array.from(new Uint8Array(await crypto.subtle.digest("SHA-256", await blob.arrayBuffer())), hexadecimal).join("");
};
const hexadecimal = byte => byte.toString(16).padStart(2, "0");
