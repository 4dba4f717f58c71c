// Several runs: the keys in which they differ, their curves in one chart each, and the paired statistics of `evaluate`.
import { el, get, link, number, table } from "/static/dom.js";
import { chart } from "/static/chart.js";
export async function showComparison(main, runs) {
  const found = await get("/api/runs/compare", { run: runs }), lines = found.keys.length ? (await get("/api/runs/curves", { run: runs, key: found.keys })).lines : {};
  const first = ["train_loss", "held_out_loss"], order = [...first.filter((key) => found.keys.includes(key)), ...found.keys.filter((key) => !first.includes(key) && !["loss", "bad_rows"].includes(key))];
  const charts = order.map((key) => chart(key, runs.map((run, i) => ({ name: run, colour: i, points: lines[run]?.[key]?.smooth ?? lines[run]?.[key]?.points ?? [] })), { log: key.includes("loss") })).filter(Boolean);
  const paired = el("div", {}, el("p", { class: "soft" }, "Comparing the evaluations that both have …"));
  main.append(el("p", {}, el("a", { href: link("Runs") }, "All runs")), el("h1", {}, "Comparison"), el("h2", {}, "What differs"),
    found.differences.length ? table(["key", ...runs], found.differences.map((row) => [el("code", {}, row.key), ...row.values.map((value) => value ?? "–")]), "wide-table") : el("p", { class: "soft" }, "Their configs are the same."),
    el("h2", {}, "Scores of the same pictures"), paired, el("h2", {}, "Curves"), el("div", { class: "charts" }, charts));
  try {
    const all = await Promise.all(runs.slice(1).map((other) => get("/api/runs/paired", { run: [other, runs[0]] }).then((result) => ({ other, ...result }))));
    paired.replaceChildren(...all.map(({ other, pairs }) => pairs.length ? el("section", {}, el("h3", {}, `${other} against ${runs[0]}`), pairs.map((pair) => el("div", {}, el("p", { class: "soft" }, `${pair.one} against ${pair.other}`),
      table(["metric", "difference", "95 % interval", "p", "better", "pictures"], Object.entries(pair.metrics).map(([key, value]) => [key, value.difference, value.low === null ? "" : `${number(value.low)} to ${number(value.high)}`, value.p ?? "", el("span", { class: value.better === "this" ? "better" : value.better === "other" ? "worse" : "" }, value.better === "neither" ? "no difference shown" : value.better === "this" ? other : runs[0]), value.examples]))))) : el("p", { class: "soft" }, `${other} and ${runs[0]} have no evaluation of the same figures by the same metrics. Evaluate both.`)));
  } catch (error) { paired.replaceChildren(el("p", { class: "problems" }, error.message)); }
}
