// The queue: what waits, runs and ran on which device; and the form of a new run (form.js).
import { button, dialog, el, get, link, post, say, table } from "/static/dom.js";
import { showForm } from "/static/form.js";
import { on } from "/static/live.js";
const PAGE_OF = { illustrate: "Illustrate", bench: "Bench" }; // where what a command makes is shown; else at its run
const time = (seconds) => seconds ? new Date(seconds * 1000).toLocaleString() : "";
export async function show(main, path) {
  if (path[0] === "new") return showForm(main, path.slice(1).join("/"));
  const place = el("div");
  main.append(el("h1", {}, "Queue"), el("p", { class: "lead" }, "One command at a time on each device. What runs goes on when this page, or the studio itself, ends."), el("div", { class: "tools" }, el("a", { class: "act", href: link("Queue", "new") }, "New run")), place);
  const draw = async () => {
    const { jobs, devices } = await get("/api/queue");
    place.replaceChildren(el("dl", { class: "facts" }, devices.map((device) => el("div", {}, el("dt", {}, device.name === "cpu" ? "CPU" : `GPU ${device.name}`), el("dd", {}, device.what)))),
      jobs.length ? table(["Job", "What", "State", "Device", "Began", "Ended", ""], jobs.map((job) => [job.number,
        el("span", {}, job.run ? el("a", { href: link(PAGE_OF[job.command] ?? "Runs", ...job.run.split("/")) }, job.title) : job.title, el("div", { class: "soft mono" }, `scienceflow ${job.command}`)),
        el("span", {}, el("span", { class: `badge ${job.state.name}` }, job.state.name), job.state.reason ? el("div", { class: "soft" }, job.state.reason) : ""), job.state.device ?? "", time(job.state.since), time(job.state.until),
        el("span", {}, ["waiting", "blocked", "running"].includes(job.state.name) ? button("Stop", async () => { await post("/api/queue/stop", { number: job.number }); await draw(); }) : "",
          ["done", "stopped", "failed", "killed"].includes(job.state.name) ? [button("Again", async () => { const { number } = await post("/api/queue/again", { number: job.number }); say(`Queued as job ${number}.`); await draw(); }), " ", button("Remove", async () => { await post("/api/queue/remove", { number: job.number }); await draw(); })] : "", " ",
          button("Log", async () => dialog(`Log of job ${job.number}`, el("pre", {}, (await get("/api/queue/log", { number: job.number })).text || "It has said nothing yet."))))])) : el("p", { class: "soft" }, "Nothing was queued yet."));
  };
  await draw();
  let first = true;
  return on("queue", () => { if (!first) draw(); first = false; });
}
