// The page of data: sources; the grid of one with filters and statistics (grid.js, figure.js).
import { button, el, field, get, link, number, say, table } from "/static/dom.js";
import { showFigure } from "/static/figure.js";
import { Grid } from "/static/grid.js";
export async function show(main, path) {
  if (path.length) return showSource(main, path.join("/"));
  const found = await get("/api/data/sources"), kinds = { store: "store", figures: "folder of figures", list: "list, a revision" };
  main.append(el("h1", {}, "Data"), found.length ? table(["Source", "What", ""], found.map((one) => [el("a", { href: link("Data", ...(one.name || ".").split("/")) }, one.name || "."), kinds[one.kind],
    one.kind === "store" ? "" : el("a", { href: link("Queue", "new", `figures:${one.name}`) }, "Train on it")])) : el("p", { class: "soft" }, "No figures in this folder yet. Put pictures with captions (x.png with x.txt), a list or a table below it, and load this page again."));
}
async function showSource(main, name) {
  const says = el("p", { class: "soft", role: "status" }, "Opening …"), body = el("div");
  main.append(el("p", {}, el("a", { href: link("Data") }, "All sources")), el("h1", {}, name), says, body);
  let over = false, found;
  const open = async (anew) => {
    found = await get("/api/data/open", { source: name, anew: anew ? "yes" : "" });
    while (!found.ready && !over) {
      says.textContent = `Listing the figures: ${number(found.rows)} so far …`;
      await new Promise((done) => setTimeout(done, 250));
      found = await get("/api/data/open", { source: name });
    }
  };
  await open(false);
  if (over) return undefined;
  says.textContent = `${number(found.used)} figures${found.left_out ? `, ${number(found.left_out)} left out` : ""}`;
  const edits = new Map(), revision = el("div"), total = el("span", { class: "soft", role: "status" });
  const choice = (key, label, counts) => counts.length > 0 && field(label, el("select", { id: `f-${key}`, onchange: () => filter() }, el("option", { value: "" }, "all"), counts.map(([value, count]) => el("option", { value }, `${value} (${number(count)})`))));
  const text = el("input", { type: "search", id: "f-text", placeholder: "word of the caption, or name" }), shortest = el("input", { type: "number", id: "f-shortest", min: 0, step: 50 }), longest = el("input", { type: "number", id: "f-longest", min: 0, step: 50 });
  const out = el("select", { id: "f-out", onchange: () => filter() }, el("option", { value: "" }, "figures that are used"), el("option", { value: "yes" }, `left out (${number(found.left_out)})`));
  const grid = new Grid(name, (count) => { total.textContent = `${number(count)} shown`; }, (row) => showFigure(name, row, edits, marked));
  const marked = () => revision.replaceChildren(...(edits.size ? [el("p", {}, `${edits.size} caption${edits.size > 1 ? "s" : ""} edited. `, button("Save as a new revision", async () => {
    const { post } = await import("/static/dom.js"), made = await post("/api/data/revise", { source: name, captions: Object.fromEntries(edits) });
    edits.clear();
    marked();
    say(`${made.changed} captions changed in ${made.source}`);
    location.hash = link("Data", ...made.source.split("/"));
  }, "main"))] : []));
  let timer;
  const filter = () => grid.filter(Object.fromEntries(["bucket", "tier", "kind", "reason", "text", "shortest", "longest", "out"].map((key) => [key, body.querySelector(`#f-${key}`)?.value]).filter(([, value]) => value)));
  for (const one of [text, shortest, longest]) one.addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(filter, 250); });
  const bars = (title, counts) => counts.length > 0 && el("section", {}, el("h3", {}, title), el("ul", { class: "bars" }, counts.slice(0, 16).map(([value, count]) => el("li", {}, el("span", {}, value), el("meter", { min: 0, max: Math.max(...counts.map((one) => one[1]), 1), value: count }), el("b", {}, number(count))))));
  body.append(el("div", { class: "tools" }, field("Search", text, "grow"), choice("bucket", "Size", found.bucket), choice("tier", "Tier", found.tier), choice("kind", "Kind", found.kind), field("Caption at least", shortest), field("at most, characters", longest), found.left_out ? field("Show", out) : "", choice("reason", "Reason", found.reason)),
    el("div", { class: "tools" }, total, found.store ? "" : el("a", { class: "act", href: link("Queue", "new", `figures:${name}`) }, "Train on it"), button("List again", async () => { await open(true); dispatchEvent(new HashChangeEvent("hashchange")); })), revision, grid.element,
    el("h2", {}, "Statistics"), el("div", { class: "two" }, bars("Size", found.bucket), bars("Tier", found.tier), bars("Kind", found.kind), bars("Characters of the caption", found.length), bars("Left out, by reason", found.reason)));
  grid.filter({});
  return () => { over = true; grid.end(); };
}
