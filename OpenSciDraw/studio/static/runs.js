// The page of runs: all of them; one, or several beside each other, in run.js and compare.js.
import { button, duration, el, get, link, number, post, say, table } from "/static/dom.js";
import { on } from "/static/live.js";
import { showComparison } from "/static/compare.js";
import { badge, showRun } from "/static/run.js";
export async function show(main, path) {
  if (path[0] === "compare") return showComparison(main, path.slice(1));
  if (path.length) return showRun(main, path.join("/"));
  const chosen = new Set(), list = el("div"), compare = button("Compare the chosen ones", async () => {
    if (chosen.size < 2) throw new Error("Choose at least two runs.");
    location.hash = link("Runs", "compare", ...chosen);
  });
  main.append(el("h1", {}, "Runs"), el("div", { class: "tools" }, el("a", { class: "act", href: link("Queue", "new") }, "New run"), compare), list);
  const draw = (runs) => {
    if (!runs.length) {
      list.replaceChildren(el("p", { class: "soft" }, "No run in this folder yet. Begin a new one, or start one in a shell with its model_output_dir inside this folder: it appears here."));
      return;
    }
    list.replaceChildren(table(["", "Run", "Status", "Step", "Loss", "Held-out", "Memory", "Left", ""], runs.map((run) => [
      el("input", { type: "checkbox", "aria-label": `Compare ${run.name}`, checked: chosen.has(run.name), onchange: (event) => event.target.checked ? chosen.add(run.name) : chosen.delete(run.name) }),
      el("span", {}, el("a", { href: link("Runs", ...run.name.split("/")) }, run.title), run.title === run.name ? "" : el("div", { class: "soft" }, run.name)),
      badge(run), el("span", {}, run.total ? el("progress", { max: run.total, value: run.step, "aria-label": "steps" }) : "", ` ${number(run.step)}${run.total ? ` of ${number(run.total)}` : ""}`),
      run.loss ?? "", run.held_out ?? "", run.memory_gb ? `${number(run.memory_gb)} GB` : "", duration(run.seconds_left), actions(run),
    ])));
  };
  draw(await get("/api/runs"));
  return on("runs", draw);
}
export function actions(run) {
  if (["running", "starting", "queued"].includes(run.status)) return button("Stop", async () => { await post("/api/runs/stop", { run: run.name }); say(`${run.name}: told to stop. It saves a checkpoint first.`); });
  if (["stopped", "failed"].includes(run.status)) return button("Go on", async () => { await post("/api/runs/start", { run: run.name }); say(`${run.name}: queued, from its last checkpoint.`); });
  return "";
}
