"use strict";
// Light, dark or as the system; before the page is shown, so that it does not flash. A classic script for that reason.
(() => {
  const NAMES = { auto: "as the system", light: "light", dark: "dark" };
  const root = document.documentElement;
  let theme = "auto";
  try {
    const saved = localStorage.getItem("studio.theme");
    theme = saved in NAMES ? saved : "auto";
  } catch { /* storage is switched off: the choice lasts until the page is closed */ }

  const apply = () => {
    root.dataset.theme = theme;
    const button = document.getElementById("theme-button");
    if (!button) return;
    const text = `Colours: ${NAMES[theme]}`;
    button.setAttribute("aria-label", text);
    button.title = text;
    button.querySelector("use").setAttribute("href", `#i-${theme}`);
  };

  apply();
  document.addEventListener("DOMContentLoaded", () => {
    apply();
    document.getElementById("theme-button").addEventListener("click", () => {
      const names = Object.keys(NAMES);
      theme = names[(names.indexOf(theme) + 1) % names.length];
      try { localStorage.setItem("studio.theme", theme); } catch { /* as above */ }
      apply();
    });
  });
})();
