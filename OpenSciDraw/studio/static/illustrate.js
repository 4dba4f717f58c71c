// The page of illustrations: a paper or a paragraph, what draws, who writes and judges; what came of it.
import { button, dialog, el, field, get, link, number, post, query, say, table } from "/static/dom.js";
import { actions, badge, count, drawing, endpoint, facts, input, isLive, keyNote, named, select, shell, state, targets, values, watch } from "/static/ask.js";
export async function show(main, path) {
  if (path.length) return showOne(main, path.join("/"));
  const chosen = await get("/api/illustrate/choices"), list = el("div"), text = el("textarea", { id: "text", rows: 6, placeholder: "Or a paragraph: what the figure is to show" });
  const form = el("div", {}, el("div", { class: "two" }, el("div", {}, field("Paper in the folder", named("source", chosen.sources, "LaTeX project, e-print, or a .md or .txt file")), field("Only these figures of it", input("only", { placeholder: "all; e.g. fig2 fig:overview" })), field("Paragraph", text)),
    el("div", { class: "form tight" }, field("Draw with", await targets()), field("Descriptions of each figure", count("candidates", "2")), field("Pictures of each description", count("pictures", "4")), field("Rounds of refining", count("refine", "0", { min: 0 })), field("Refine by", select("refine_by", [["text", "a better description"], ["edit", "an edit of the best picture"]])), field("Name", input("name", { placeholder: "made from the source" })))),
    el("details", {}, el("summary", {}, "Who writes and judges"), el("div", { class: "two" }, el("div", {}, endpoint("writer", "Writer", "Writes the descriptions. Without one, the paper's own captions and contexts are drawn.")), el("div", {}, endpoint("judge", "Judge", "Scores the pictures. Without one, what can be read in them is compared with the description."))), keyNote(chosen)),
    el("details", {}, el("summary", {}, "How is drawn"), el("div", { class: "form tight" }, field("Width, px", count("width", "as in validation", { min: 32 })), field("Height, px", count("height", "as in validation", { min: 32 })), field("At most, figures", count("limit", "all")), drawing())));
  main.append(el("h1", {}, "Illustrate"), el("p", { class: "lead" }, "A paper or a paragraph becomes figures: described, drawn, scored and refined. It is a job of the queue, so it goes on when this page ends."), form, el("div", { class: "tools" }, button("Illustrate", async () => {
    const { folder, job } = await post("/api/illustrate/start", values(form));
    say(`Queued as job ${job}.`);
    location.hash = link("Illustrate", ...folder.split("/"));
  }, "main")), el("h2", {}, "Illustrations"), list);
  let rows = [];
  const draw = async () => {
    rows = await get("/api/illustrate");
    list.replaceChildren(rows.length ? table(["Folder", "State", "Figures", "Pictures", "Best score", "Drawn with", "Source"], rows.map((row) => [el("a", { href: link("Illustrate", ...row.folder.split("/")) }, row.folder), badge(row), row.subjects ?? "", row.drawn ?? "", row.best ?? "", row.what ?? "", row.source ?? row.problem ?? ""]), "wide-table") : el("p", { class: "soft" }, "None in this folder yet. One that is made in a shell, with --out inside this folder or of a run in it, appears here."));
  };
  await draw();
  return watch(draw, () => rows.some(isLive));
}
async function showOne(main, folder) {
  const head = el("div"), body = el("div");
  main.append(el("p", {}, el("a", { href: link("Illustrate") }, "All illustrations")), el("h1", {}, folder), head, body);
  let row, before = "";
  const draw = async () => {
    row = await get("/api/illustrate/one", { folder });
    head.replaceChildren(...state(row).filter((one) => one !== ""), facts([["Drawn with", row.what], ["Source", row.source], ["Pictures drawn", number(row.drawn)], ...row.facts]), actions("illustrate", row, draw), shell(row));
    const now = JSON.stringify(row.subjects ?? []);
    if (now !== before) body.replaceChildren(...(row.subjects ?? []).map((subject) => subjectOf(folder, subject)));
    before = now;
  };
  await draw();
  return watch(draw, () => isLive(row));
}
const score = (value) => value === null ? "not scored" : `score ${number(value)}`;
function subjectOf(folder, subject) {
  const kept = subject.candidates.filter((one) => one.kept).sort((one, other) => (other.score ?? -1) - (one.score ?? -1))[0];
  return el("section", {}, el("h2", {}, subject.id), el("details", {}, el("summary", {}, "What was asked for"), subject.caption ? el("p", {}, subject.caption) : "", subject.context ? el("p", { class: "soft" }, subject.context) : ""),
    subject.candidates.map((candidate) => el("section", { "data-candidate": candidate.id }, el("h3", {}, candidate.id, " ", candidate.kept ? el("span", { class: "badge done" }, candidate === kept ? "best" : "kept") : ""),
      el("p", { class: "soft" }, [score(candidate.score), candidate.instruction === null ? `description: ${candidate.by}` : `edit of ${candidate.edited}: ${candidate.instruction}`, candidate.round ? `round ${candidate.round}` : ""].filter(Boolean).join(" · ")), el("p", {}, candidate.text),
      el("div", { class: "draws" }, candidate.pictures.map((picture, at) => pictureOf(folder, candidate, picture, candidate === kept && at === 0))))));
}
function pictureOf(folder, candidate, picture, best) {
  const src = `/api/illustrate/picture?${query({ folder, file: picture.file })}`, words = `${score(picture.score)}, seed ${picture.seed}`;
  const findings = picture.failure ? [picture.failure] : picture.findings;
  const large = () => dialog(`${candidate.id}: ${words}`, el("img", { class: "shot", src, alt: picture.prompt }), el("p", {}, picture.prompt), findings.length ? el("ul", {}, findings.map((one) => el("li", {}, one))) : el("p", { class: "soft" }, "Nothing was found wrong."), el("p", { class: "tools" }, el("a", { class: "act", href: src, download: picture.file }, "Download")));
  return el("figure", { class: best ? "best" : "" }, el("button", { type: "button", class: "picture", onclick: large }, el("img", { src, alt: `${candidate.id}, ${words}`, loading: "lazy" })), el("figcaption", {}, best ? el("b", {}, "Best · ") : "", words, findings.length ? `. Found: ${findings.slice(0, 3).join("; ")}${findings.length > 3 ? ` and ${findings.length - 3} more` : ""}` : ""));
}
