// The playground: a prompt, seeds and strengths; what comes of them, side by side; the structure that the metric reads, over a picture.
import { button, dialog, el, field, get, number, post, query, say, svg, upload } from "/static/dom.js";
import { showEditable } from "/static/editable.js";
import { on } from "/static/live.js";
export async function show(main, path) {
  const targets = await get("/api/playground/targets"), names = { run: "Runs", checkpoint: "Checkpoints", base: "Bases" }, given = path.slice(1).join("/");
  const target = el("select", { id: "target" }, ["run", "checkpoint", "base"].map((kind) => { const own = targets.filter((one) => one.kind === kind); return own.length ? el("optgroup", { label: names[kind] }, own.map((one) => el("option", { value: one.target }, one.title))) : ""; }));
  if (path[0] === "run" && targets.some((one) => one.target === given)) target.value = given;
  const prompt = el("textarea", { id: "prompt", rows: 4, placeholder: "What to draw; with a picture, what to change in it" }), images = path[0] === "edit" ? [given] : [];
  const seeds = el("input", { type: "text", id: "seeds", value: "0, 1, 2, 3", inputMode: "numeric" }), strengths = el("input", { type: "text", id: "strengths", value: "1" }), negative = el("input", { type: "text", id: "negative" });
  const steps = el("input", { type: "number", id: "steps", min: 1, placeholder: "as the run" }), guidance = el("input", { type: "number", id: "guidance", min: 0, step: 0.5, placeholder: "as the run" }), width = el("input", { type: "number", id: "width", min: 32, step: 8, placeholder: "as the run" }), height = el("input", { type: "number", id: "height", min: 32, step: 8, placeholder: "as the run" }), base = el("input", { type: "text", id: "other-base", placeholder: "the run's own" }), ema = el("input", { type: "checkbox", id: "ema" });
  const chosen = el("div", { class: "tools" }), list = el("div"), file = el("input", { type: "file", id: "file", accept: "image/*", "aria-label": "Picture to edit" });
  const drawImages = () => chosen.replaceChildren(...images.map((image, at) => el("div", {}, el("img", { class: "shot", alt: "Picture to edit", src: `/api/playground/preview?${query({ image })}`, height: 110 }), button("Leave out", async () => { images.splice(at, 1); drawImages(); }))));
  const edit = (image) => { images.splice(0, images.length, image); drawImages(); prompt.focus(); prompt.scrollIntoView({ block: "center" }); };
  file.addEventListener("change", async () => { try { if (file.files[0]) { images.push((await upload(file.files[0])).image); drawImages(); } } catch (error) { say(error.message, true); } file.value = ""; });
  const numbers = (input) => { const found = input.value.split(/[\s,;]+/).filter(Boolean).map(Number); if (!found.length || found.some((one) => !Number.isFinite(one))) throw new Error(`${input.id}: numbers with commas between them, such as 0, 1, 2`); return found; };
  main.append(el("h1", {}, "Playground"), el("div", { class: "two" }, el("div", {}, field("Draw with", target), field("Prompt", prompt), el("div", { class: "tools" }, button("Draw", async () => {
    const asked = { target: target.value, prompt: prompt.value, seeds: numbers(seeds), strengths: numbers(strengths), negative: negative.value, images, base: base.value, ema: ema.checked ? "yes" : "" };
    for (const one of [steps, width, height, guidance]) if (one.value) asked[one.id] = one.value;
    await post("/api/playground/draw", asked);
    await redraw();
  }, "main"), button("Stop", async () => { await post("/api/playground/stop"); }), field("Picture to edit", file)), chosen),
  el("div", { class: "form tight" }, field("Seeds", seeds), field("Strengths of the adapter", strengths), field("Steps", steps), field("Guidance", guidance), field("Width, px", width), field("Height, px", height), field("Negative prompt", negative), field("Another base", base), el("label", {}, ema, " averaged weights (EMA)"))), el("h2", {}, "Drawn"), list);
  drawImages();
  const shown = new Map();
  const one = (found) => {
    const total = found.seeds.length * found.strengths.length, pictures = Array.from({ length: total }, (_, at) => {
      const settings = found.pictures.find((picture) => picture.picture === at), seed = found.seeds[Math.floor(at / found.strengths.length)], strength = found.strengths[at % found.strengths.length], words = `seed ${seed}${found.strengths.length > 1 || strength !== 1 ? `, strength ${number(strength)}` : ""}`;
      if (!settings) return found.state === "failed" ? "" : el("figure", {}, el("div", { class: "wait" }, found.state), el("figcaption", {}, words));
      const image = `drawn:${found.id}:${at}`, src = `/api/playground/picture?${query({ id: found.id, number: at })}`;
      return el("figure", {}, el("button", { type: "button", class: "picture", onclick: () => large(found, src, image, words, edit) }, el("img", { src, alt: `${found.prompt}; ${words}`, loading: "lazy" })), el("figcaption", {}, words, " · ", el("a", { href: src, download: `${found.id}-${at}.png` }, "Download")));
    });
    return el("section", { "data-drawing": found.id }, el("h3", {}, found.prompt), el("p", { class: "soft" }, [found.target, found.done && `${found.done.steps} steps, guidance ${number(found.done.guidance)}, ${found.done.width} x ${found.done.height} px`, found.names.length && `edited from ${found.names.join(", ")}`, new Date(found.time * 1000).toLocaleString()].filter(Boolean).join(" · ")),
      found.error ? el("p", { class: "problems" }, found.error) : "", el("div", { class: "draws" }, pictures), el("details", {}, el("summary", {}, "The same in a shell"), el("pre", {}, found.command)));
  };
  const place = (found, first) => {
    const made = one(found), old = shown.get(found.id);
    if (old) old.replaceWith(made); else if (first) list.prepend(made); else list.append(made);
    shown.set(found.id, made);
  };
  const redraw = async () => { const all = await get("/api/playground/drawn"); list.replaceChildren(); shown.clear(); for (const found of all) place(found, false); if (!all.length) list.append(el("p", { class: "soft" }, "Nothing was drawn yet.")); };
  await redraw();
  let busy = 0;
  return on("work", (all) => { for (const found of all) place(found, true); if (busy && all.length < busy) redraw(); busy = all.length; });
}
async function large(found, src, image, words, edit) {
  const over = el("div", { class: "overlay" }, el("img", { class: "shot", src, alt: found.prompt })), note = el("p", { class: "soft", role: "status" }), files = el("div", { role: "status" });
  const place = dialog(words, over, note, files, el("div", { class: "tools" }, button("Show the structure that is read", async () => {
    note.textContent = "Reading …";
    const read = await get("/api/playground/read", { image });
    over.querySelector("svg")?.remove();
    over.append(overlay(read));
    note.textContent = `${read.components.length} shapes, ${read.arrows.length} arrows: ${read.components.map((part) => `${part.color} ${part.shape}${part.label ? ` '${part.label}'` : ""}`).join(", ")}`;
  }), button("Editable: SVG, TikZ, PPTX", () => showEditable(files, image)), button("Edit this picture", async () => { place.close(); edit(image); }), el("a", { class: "act", href: src, download: `${found.id}.png` }, "Download")), el("p", {}, found.prompt));
}
export function overlay(read) {
  const root = svg("svg", { viewBox: `0 0 ${read.width} ${read.height}`, role: "img", "aria-label": "Structure that the metric reads" }), size = Math.max(read.width, read.height) / 26;
  const defs = svg("defs"), head = svg("marker", { id: "head", viewBox: "0 0 10 10", refX: 9, refY: 5, markerWidth: 5, markerHeight: 5, orient: "auto" });
  head.append(svg("path", { d: "M0 0L10 5L0 10z", fill: "#0072b2" }));
  defs.append(head);
  root.append(defs);
  const middle = ({ box: [x0, y0, x1, y1] }) => [(x0 + x1) / 2, (y0 + y1) / 2];
  for (const { source, target, directed } of read.arrows) {
    if (!read.components[source] || !read.components[target]) continue;
    const [x1, y1] = middle(read.components[source]), [x2, y2] = middle(read.components[target]);
    root.append(svg("line", { x1, y1, x2, y2, ...(directed ? { "marker-end": "url(#head)" } : { "stroke-dasharray": "4 3" }) }));
  }
  for (const { box: [x0, y0, x1, y1], label, shape, color } of [...read.components, ...read.texts.map((text) => ({ ...text, label: text.text, shape: "", color: "" }))]) root.append(svg("rect", { x: x0, y: y0, width: x1 - x0, height: y1 - y0 }), svg("text", { class: "label", x: x0 + 1, y: Math.max(size, y0 - 2), "font-size": size }, [label, color, shape].filter(Boolean).join(" ")));
  return root;
}
