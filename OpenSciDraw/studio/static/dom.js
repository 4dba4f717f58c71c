// Elements and calls. Text reaches the page as text alone: nothing here, nor elsewhere, makes markup of strings.
export function el(tag, props = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name === "class") made.className = value;
    else if (name in made && !["list", "form", "type", "role"].includes(name)) made[name] = value;
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false).map((child) => child instanceof Node ? child : String(child)));
  return made;
}
export function svg(tag, attributes = {}, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}
export function query(values) {
  const found = new URLSearchParams();
  for (const [name, value] of Object.entries(values)) for (const one of [value].flat()) if (one !== undefined && one !== null) found.append(name, one);
  return found.toString();
}
async function answer(response) {
  const said = await response.json().catch(() => ({ error: `The studio answered ${response.status}.` }));
  if (!response.ok) throw new Error(said.error ?? `The studio answered ${response.status}.`);
  return said;
}
export const get = async (path, values = {}) => answer(await fetch(`${path}?${query(values)}`));
export const post = async (path, values = {}) => answer(await fetch(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(values) }));
export async function upload(file) {
  return answer(await fetch("/api/upload", { method: "POST", headers: { "Content-Type": file.type || "image/png" }, body: file }));
}
export function say(text, bad = false) {
  const line = el("p", { class: bad ? "bad" : "" }, text);
  document.querySelector("#says").append(line);
  setTimeout(() => line.remove(), bad ? 12000 : 5000);
}
// A button whose work may fail: the reason is said, and the button waits meanwhile.
export function button(text, work, kind = "") {
  const made = el("button", { type: "button", class: `act ${kind}`, onclick: async () => {
    made.disabled = true;
    try { await work(); } catch (error) { say(error.message, true); } finally { made.disabled = false; }
  } }, text);
  return made;
}
export function dialog(title, ...body) {
  const place = document.querySelector("#dialog");
  document.querySelector("#dialog-title").textContent = title;
  document.querySelector("#dialog-body").replaceChildren(...body);
  if (!place.open) place.showModal();
  return place;
}
export function table(head, rows, kind = "") {
  const cell = (tag, value) => el(tag, typeof value === "number" ? { class: "number" } : {}, value instanceof Node ? value : typeof value === "number" ? number(value) : value ?? "");
  return el("div", { class: "scroll" }, el("table", { class: kind }, el("thead", {}, el("tr", {}, head.map((name, at) => el("th", typeof rows[0]?.[at] === "number" ? { class: "number" } : {}, name)))), el("tbody", {}, rows.map((row) => el("tr", {}, row.map((value) => cell("td", value)))))));
}
export function number(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "";
  return Number.isInteger(value) ? value.toLocaleString("en") : Math.abs(value) >= 1e5 || (value && Math.abs(value) < 1e-3) ? value.toExponential(1) : String(Number(value.toPrecision(4)));
}
export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "";
  const minutes = Math.round(seconds / 60);
  return seconds < 90 ? `${Math.round(seconds)} s` : minutes < 90 ? `${minutes} min` : `${(minutes / 60).toFixed(1)} h`;
}
export const field = (text, input, kind = "") => el("label", { class: `field ${kind}` }, text, input);
export const link = (...path) => `#${path.map(encodeURIComponent).join("/")}`;
