// Forms of commands that draw into a folder of their own, and how far these are: what the pages of illustrations and benches share.
import { button, dialog, duration, el, field, get, post, query, say } from "/static/dom.js";
export const input = (id, props = {}) => el("input", { id, type: "text", autocomplete: "off", spellcheck: false, ...props });
export const count = (id, placeholder, props = {}) => el("input", { id, type: "number", min: 1, placeholder, ...props });
export const select = (id, values) => el("select", { id }, values.map(([value, text]) => el("option", { value }, text)));
// A name of something in the folder: typed, with those that are known as proposals.
export function named(id, names, placeholder) {
  const list = el("datalist", { id: `${id}-names` }, names.map((value) => el("option", { value })));
  return el("span", {}, input(id, { list: `${id}-names`, placeholder }), list);
}
export async function targets() {
  const found = await get("/api/playground/targets"), names = { run: "Runs", checkpoint: "Checkpoints", base: "Bases" };
  return el("select", { id: "target" }, Object.entries(names).map(([kind, label]) => { const own = found.filter((one) => one.kind === kind); return own.length ? el("optgroup", { label }, own.map((one) => el("option", { value: one.target }, one.title))) : ""; }));
}
export const drawing = () => [field("Steps", count("steps", "as the model")), field("Guidance", count("guidance", "as the model", { min: 0, step: 0.5 })), field("Seed of the noise", count("seed", "0", { min: 0 })), field("Pictures drawn at once", count("batch_size", "8")),
  field("Program that reads text", select("reader", [["", "as the model's config"], ["rapidocr", "rapidocr"], ["tesseract", "tesseract"]])), el("label", {}, el("input", { type: "checkbox", id: "ema" }), " averaged weights (EMA)")];
export const endpoint = (id, title, meaning) => [field(`${title}: address`, input(id, { type: "text", inputMode: "url", placeholder: "none; an OpenAI-compatible one ends in /v1" })), field(`${title}: model`, input(`${id}_model`, { placeholder: "name there" })), el("p", { class: "soft" }, meaning)];
export const keyNote = ({ key, has_key: has }) => el("p", { class: "soft" }, `The access key of an endpoint is taken from the environment variable ${key} alone, which is ${has ? "set" : "not set"} where the studio runs.`);
// What stands in the fields of a form, by their ids; empty ones are left out.
export function values(form) {
  const found = {};
  for (const one of form.querySelectorAll("input, select, textarea")) {
    const value = one.type === "checkbox" ? (one.checked ? "yes" : "") : one.value;
    if (value) found[one.id] = value;
  }
  return found;
}
export const isLive = (row) => ["waiting", "blocked", "running", "stopping"].includes(row.state.name);
export const badge = (row) => el("span", { class: `badge ${row.state.name}`, title: row.state.reason ?? "" }, row.state.name);
export function actions(kind, row, redraw) {
  const did = (work) => async () => { await work(); await redraw(); };
  return el("div", { class: "tools" }, row.job && isLive(row) && row.state.name !== "stopping" ? button("Stop", did(() => post("/api/queue/stop", { number: row.job }))) : "",
    row.job && !isLive(row) && row.state.name !== "done" ? button("Go on", did(async () => { const { job } = await post(`/api/${kind}/go_on`, { folder: row.folder }); say(`Queued as job ${job}: it goes on where it stopped.`); })) : "",
    row.job ? button("Log", async () => dialog(`Log of job ${row.job}`, el("pre", {}, (await get("/api/queue/log", { number: row.job })).text || "It has said nothing yet."))) : "",
    row.page ? el("a", { class: "act", href: `/api/${kind}/page?${query({ folder: row.folder })}`, download: `${kind}.html` }, `Save ${kind === "bench" ? "bench" : "illustrate"}.html`) : "");
}
export const state = (row) => [el("p", {}, badge(row), " ", el("span", { class: "soft" }, [row.state.reason, row.said, row.seconds ? duration(row.seconds) : ""].filter(Boolean).join(" · "))), row.problem ? el("p", { class: "problems" }, row.problem) : "", row.remarks?.length ? el("div", { class: "remarks" }, row.remarks.map((remark) => el("p", {}, remark))) : ""];
export const facts = (pairs) => el("dl", { class: "facts" }, pairs.filter(([, value]) => value !== "" && value !== null && value !== undefined).map(([title, value]) => el("div", {}, el("dt", {}, title), el("dd", {}, value))));
const shells = new Map(); // by command: what was opened stays open when the page draws itself again
export function shell({ command }) {
  if (!shells.has(command)) shells.set(command, command ? el("details", {}, el("summary", {}, "The same in a shell"), el("pre", {}, command)) : "");
  return shells.get(command);
}
// Draws again and again while something is at work, until the page is left.
export function watch(draw, live) {
  let over = false, timer;
  const next = async () => { if (over) return; try { if (live()) await draw(); } catch (error) { say(error.message, true); } timer = setTimeout(next, 2000); };
  timer = setTimeout(next, 2000);
  return () => { over = true; clearTimeout(timer); };
}
