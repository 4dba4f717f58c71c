"use strict";
// Charts: the values under the pointer.
for (const svg of document.querySelectorAll("svg[data-lines]")) {
  const lines = JSON.parse(svg.dataset.lines), figure = svg.parentElement;
  const tip = Object.assign(document.createElement("div"), { className: "tip", hidden: true });
  const rule = document.createElementNS("http://www.w3.org/2000/svg", "line");
  rule.setAttribute("class", "pointer");
  rule.setAttribute("y1", 14);
  rule.setAttribute("y2", 258);
  figure.append(tip);
  const hide = () => { tip.hidden = true; rule.remove(); };
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), at = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    const near = lines.map((line) => line.points.reduce((a, b) => Math.abs(b[2] - at) < Math.abs(a[2] - at) ? b : a));
    const first = near.reduce((a, b) => Math.abs(b[2] - at) < Math.abs(a[2] - at) ? b : a);
    rule.setAttribute("x1", first[2]);
    rule.setAttribute("x2", first[2]);
    svg.append(rule);
    tip.replaceChildren();
    const add = (text) => tip.append(Object.assign(document.createElement("div"), { textContent: text }));
    add(`${svg.dataset.x} ${first[0]}`);
    lines.forEach((line, index) => { if (near[index][0] === first[0]) add(`${line.name}: ${Number(near[index][1].toPrecision(4))}`); });
    tip.hidden = false;
    const frame = figure.getBoundingClientRect(), left = event.clientX - frame.left;
    tip.style.left = `${Math.max(4, Math.min(left + 14, figure.clientWidth - tip.offsetWidth - 4))}px`;
    tip.style.top = `${box.top - frame.top + 16}px`;
  });
}
// Pictures by step: without this script all steps are shown one below the other.
for (const series of document.querySelectorAll("[data-series]")) {
  const steps = [...series.querySelectorAll("[data-step]")];
  if (steps.length < 2) continue;
  const bar = Object.assign(document.createElement("div"), { className: "steps" });
  const label = Object.assign(document.createElement("label"), { textContent: "Step", htmlFor: "step" });
  const slider = Object.assign(document.createElement("input"), { type: "range", id: "step", min: 0, max: steps.length - 1, value: steps.length - 1 });
  const shown = Object.assign(document.createElement("output"), {});
  shown.htmlFor.add("step");
  bar.append(label, slider, shown);
  series.prepend(bar);
  for (const step of steps) step.querySelector("h3").classList.add("hidden");
  const show = () => {
    steps.forEach((step, index) => step.classList.toggle("hidden", index !== Number(slider.value)));
    shown.textContent = `step ${steps[slider.value].dataset.step}`;
    slider.setAttribute("aria-valuetext", shown.textContent);
  };
  slider.addEventListener("input", show);
  show();
}
// A picture large: the dialog keeps the focus, Esc closes it and gives the focus back.
const dialog = document.querySelector("dialog");
for (const button of document.querySelectorAll("button.picture")) {
  button.addEventListener("click", () => {
    const image = button.querySelector("img");
    dialog.querySelector("img").src = image.src;
    dialog.querySelector("img").alt = image.alt;
    dialog.querySelector("p").textContent = image.alt;
    dialog.showModal();
  });
}
dialog.querySelector("button").addEventListener("click", () => dialog.close());
dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
