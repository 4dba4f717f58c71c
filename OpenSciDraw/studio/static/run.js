// One run: how far it is, curves that grow, pictures by step, scores, config.
import { button, dialog, duration, el, get, link, number, post, query, say, table } from "/static/dom.js";
import { chart } from "/static/chart.js";
import { on } from "/static/live.js";
import { actions } from "/static/runs.js";
export const badge = (run) => el("span", { class: `badge ${run.status}`, title: run.reason }, run.status);
const GROUPS = [
  ["Loss", /^(train_loss|loss|held_out_loss)$/, true], ["Held-out loss by noise level", /^held_out_loss_q/, true], ["Training loss by noise level", /^loss_sigma_/, true],
  ["Learning rate", /^lr$/, false], ["Gradient norm", /^grad_norm$/, true], ["Images a second", /^images_per_second$/, false], ["Peak memory, GB", /^memory_gb$/, false], ["Share of time waiting for data", /^data_wait_share$/, false],
];
export function groups(keys) {
  const left = new Set(keys.filter((key) => key !== "bad_rows")), found = [];
  for (const [title, pattern, log] of GROUPS) {
    let own = [...left].filter((key) => pattern.test(key));
    own.forEach((key) => left.delete(key));
    if (title === "Loss" && own.includes("train_loss")) own = own.filter((key) => key !== "loss");
    if (own.length) found.push({ title, keys: own, log });
  }
  const others = Map.groupBy ? Map.groupBy(left, (key) => key.split("/")[0]) : new Map([...left].map((key) => [key, [key]]));
  for (const [title, own] of others) found.push({ title, keys: own, log: false });
  return found;
}
export async function showRun(main, name) {
  const found = await get("/api/runs/one", { run: name });
  const head = el("div"), charts = el("div", { class: "charts" });
  main.append(el("p", {}, el("a", { href: link("Runs") }, "All runs")), el("h1", {}, found.run.title), el("p", { class: "lead" }, name), head,
    found.remarks.length ? el("div", { class: "remarks" }, found.remarks.map((remark) => el("p", {}, remark))) : "", el("h2", {}, "Curves"), charts, pictures(name, found), scores(found),
    el("h2", {}, "Config"), el("details", {}, el("summary", {}, "All keys"), table(["key", "value"], Object.entries(found.config).map(([key, value]) => [el("code", {}, key), value]), "wide-table")));
  const facts = (run) => head.replaceChildren(
    el("dl", { class: "facts" }, [["Status", badge(run)], ["Step", `${number(run.step)}${run.total ? ` of ${number(run.total)}` : ""}`], ["Time left", duration(run.seconds_left) || "–"], ["Peak memory", run.memory_gb ? `${number(run.memory_gb)} GB` : "–"], ["Device", run.device ?? "–"], ["Starts", found.sessions]]
      .map(([title, value]) => el("div", {}, el("dt", {}, title), el("dd", {}, value)))),
    run.reason ? el("p", { class: ["failed"].includes(run.status) ? "bad" : "soft" }, run.reason) : "",
    el("div", { class: "tools" }, actions(run), ...["evaluate", "report", "export"].map((command) => button(command[0].toUpperCase() + command.slice(1), async () => { const { jobs } = await post("/api/queue/of_run", { command, run: name }); say(`Job ${jobs[0]}: scienceflow ${command}`); })),
      run.job ? button("Log", async () => dialog(`Log of job ${run.job}`, el("pre", {}, (await get("/api/queue/log", { number: run.job })).text))) : "", el("a", { href: link("Playground", "run", name) }, "Draw with it"), el("a", { href: link("Queue", "new", `${name}/config.py`) }, "New run from its config")));
  let version = null, steps = found.pictures.length;
  const curves = async (keys) => {
    const found = keys.length ? await get("/api/runs/curves", { run: name, key: keys }) : { whole: true, lines: { [name]: {} } }, lines = found.lines[name];
    if (!found.whole) setTimeout(() => { if (charts.isConnected) curves(keys); }, 1500); // a sample of a long file; the whole comes
    charts.replaceChildren(...groups(keys).map(({ title, keys: own, log }) => chart(title, own.flatMap((key, i) => lines[key]?.smooth && own.length < 4
      ? [{ name: `${key}, each line`, points: lines[key].points, faint: true, colour: i }, { name: key, points: lines[key].smooth, colour: i }] : [{ name: key, points: lines[key]?.smooth ?? lines[key]?.points ?? [], colour: i }]), { log })).filter(Boolean));
    if (!charts.children.length) charts.append(el("p", { class: "soft" }, "No metrics yet."));
  };
  facts(found.run);
  await curves(found.keys);
  return on("runs", async (runs) => {
    const run = runs.find((one) => one.name === name), before = version;
    if (!run || run.version === before) return;
    version = run.version;
    facts(run);
    if (before === null) return;
    const { keys, pictures: now } = await get("/api/runs/one", { run: name });
    await curves(keys);
    if (now.length !== steps) { steps = now.length; document.querySelector("#pictures")?.replaceWith(pictures(name, { ...found, pictures: now })); }
  });
}
function pictures(name, { pictures: steps, prompts }) {
  if (!steps.length) return el("section", { id: "pictures" });
  const grid = el("div", { class: "pictures" }), output = el("output", { htmlFor: "step" });
  const slider = el("input", { type: "range", id: "step", min: 0, max: steps.length - 1, value: steps.length - 1, step: 1 });
  const draw = () => {
    const { step, files } = steps[Number(slider.value)];
    output.textContent = `step ${step}`;
    slider.setAttribute("aria-valuetext", `step ${step}`);
    grid.replaceChildren(...files.map((file) => {
      const alt = prompts[parseInt(file, 10)] ?? file, src = `/api/runs/picture?${query({ run: name, step, file })}`;
      return el("figure", {}, el("button", { type: "button", class: "picture", onclick: () => dialog(`Step ${step}`, el("img", { src, alt }), el("p", {}, alt)) }, el("img", { src, alt, loading: "lazy" })), el("figcaption", {}, alt));
    }));
  };
  slider.addEventListener("input", draw);
  draw();
  return el("section", { id: "pictures" }, el("h2", {}, "Validation pictures"), steps.length > 1 ? el("div", { class: "steps" }, el("label", { htmlFor: "step" }, "Step"), slider, output) : el("p", { class: "soft" }, output), grid);
}
function scores({ evaluations }) {
  return evaluations.length ? el("section", {}, el("h2", {}, "Scores"), evaluations.map((one) => el("details", { open: true }, el("summary", {}, one.name),
    table(["metric", "value", "95 % interval", "examples"], Object.entries(one.metrics).map(([key, value]) => [key, value.value, value.low === null ? "" : `${number(value.low)} to ${number(value.high)}`, value.examples]))))) : "";
}
