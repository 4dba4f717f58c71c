// The page of benches: prompts and rubrics, what draws, who judges; the tables by difficulty and axis, several beside each other.
import { button, el, field, get, link, number, post, say, table } from "/static/dom.js";
import { actions, badge, count, drawing, endpoint, facts, input, isLive, keyNote, named, select, shell, state, targets, values, watch } from "/static/ask.js";
export async function show(main, path) {
  if (path[0] === "compare") return showSeveral(main, path.slice(1));
  if (path.length) return showSeveral(main, [path.join("/")]);
  const known = await get("/api/bench/choices"), list = el("div"), chosen = new Set();
  const protocols = { ours: "ours: the picture against its checklist", published: "published: reference and picture together", both: "both" };
  const form = el("div", {}, el("div", { class: "form" }, field("Prompts", named("prompts", known.files, "prompts, or the folder of all difficulties")), field("Rubrics", named("rubrics", known.files, "likewise")), field("Draw with", await targets()), field("Only the first, of each difficulty", count("limit", "all")), field("Name", input("name", { placeholder: "made from model and prompts" }))),
    el("details", {}, el("summary", {}, "Who judges, and how"), el("div", { class: "two" }, el("div", {}, endpoint("judge", "Judge", "A vision-language model. Without one, the quoted words of a prompt are read in the picture."), keyNote(known)), el("div", {}, field("Protocol", select("protocol", known.protocols.map((name) => [name, protocols[name] ?? name]))), field("References (published)", input("references", { placeholder: "folder of the papers' figures" })), field("Instructions (published)", input("instructions", { placeholder: "ours; or the released eval_benchmark.py" })), field("Rounds (published)", count("rounds", "1"))))),
    el("details", {}, el("summary", {}, "How is drawn"), el("div", { class: "form tight" }, drawing())));
  main.append(el("h1", {}, "Bench"), el("p", { class: "lead" }, "SciFormaBench's prompts and rubrics as they are: drawn, judged, and set out by difficulty and axis. It is a job of the queue, so it goes on when this page ends."), form, el("div", { class: "tools" }, button("Start", async () => {
    const { folder, job, pictures, remarks } = await post("/api/bench/start", values(form));
    say([`Queued as job ${job}: ${number(pictures)} pictures.`, ...remarks].join("\n"));
    location.hash = link("Bench", ...folder.split("/"));
  }, "main")), el("h2", {}, "Results"), el("div", { class: "tools" }, button("Show the chosen ones side by side", async () => {
    if (chosen.size < 2) throw new Error("Choose at least two results.");
    location.hash = link("Bench", "compare", ...chosen);
  })), list);
  let rows = [];
  const draw = async () => {
    rows = await get("/api/bench");
    list.replaceChildren(rows.length ? table(["", "Folder", "State", "Progress", "Drawn with", "Prompts", "When"], rows.map((row) => [el("input", { type: "checkbox", "aria-label": `Compare ${row.folder}`, checked: chosen.has(row.folder), onchange: (event) => event.target.checked ? chosen.add(row.folder) : chosen.delete(row.folder) }), el("a", { href: link("Bench", ...row.folder.split("/")) }, row.folder), badge(row), bar(row), row.what ?? "", row.prompts ?? row.problem ?? "", row.created ?? ""]), "wide-table") : el("p", { class: "soft" }, "None in this folder yet. One that is made in a shell, with --out inside this folder or of a run in it, appears here."));
  };
  await draw();
  return watch(draw, () => rows.some(isLive));
}
const bar = ({ progress }) => progress?.pictures ? el("span", {}, el("progress", { max: progress.pictures, value: progress.drawn, "aria-label": "pictures drawn" }), ` ${number(progress.drawn)} of ${number(progress.pictures)} drawn, ${number(progress.measured)} judgements`) : "";
async function showSeveral(main, folders) {
  const body = el("div");
  main.append(el("p", {}, el("a", { href: link("Bench") }, "All results")), el("h1", {}, folders.length > 1 ? "Side by side" : folders[0]), body);
  let rows = [];
  const draw = async () => {
    rows = await get("/api/bench/several", { folder: folders });
    const order = [...new Set(rows.flatMap((row) => (row.tables ?? []).map((one) => one.name)))];
    body.replaceChildren(...order.filter(() => rows.length > 1).map((name) => beside(name, rows)), el("div", { class: rows.length > 1 ? "two" : "" }, rows.map((row) => el("section", { "data-bench": row.folder }, rows.length > 1 ? el("h2", {}, row.folder) : "", state(row), el("p", {}, bar(row)), facts([["Drawn with", row.what], ["Prompts", row.prompts], ["When", row.created], ...(row.facts ?? [])]), actions("bench", row, draw), shell(row),
      rows.length > 1 ? "" : (row.tables ?? []).map((one) => [el("h2", {}, one.title), el("p", { class: "soft" }, `${one.heading}; in brackets the 95 % interval.`), table(one.columns, one.rows, "wide-table")]),
      row.failures?.length ? [el("h3", {}, "Failures, counted as wrong"), table(["picture", "metric", "reason"], row.failures, "wide-table")] : ""))));
  };
  await draw();
  return watch(draw, () => rows.some(isLive));
}
// One protocol: a row for each difficulty of each result, so that the same axis stands below the same.
function beside(name, rows) {
  const own = rows.map((row) => [row, (row.tables ?? []).find((one) => one.name === name)]).filter(([, found]) => found), columns = [...new Set(own.flatMap(([, found]) => found.columns))].filter((one) => one !== "failures");
  const difficulties = [...new Set(own.flatMap(([, found]) => found.rows.map((line) => line[0])))];
  const lines = difficulties.flatMap((difficulty) => own.flatMap(([row, found]) => found.rows.filter((line) => line[0] === difficulty).map((line) => [difficulty, row.folder, ...columns.slice(1).map((column) => { const at = found.columns.indexOf(column); return at < 0 ? "–" : line[at]; })])));
  return el("section", {}, el("h2", {}, own[0][1].title), el("p", { class: "soft" }, [...new Set(own.map(([, found]) => found.heading))].join(" / ")), table(["difficulty", "result", ...columns.slice(1)], lines, "wide-table"));
}
