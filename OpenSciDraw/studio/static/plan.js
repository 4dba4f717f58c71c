// A plan: memory, time and disk of a config on this machine, before anything loads.
import { duration, el, number, post, table } from "/static/dom.js";
const gb = (bytes) => bytes < 1e8 ? `${number(bytes / 1e6)} MB` : `${number(bytes / 1e9)} GB`;
export async function planOf(base, changes) {
  const found = await post("/api/plan", { base, changes }), { plan } = found;
  const memory = Object.entries(plan.memory).filter(([, bytes]) => bytes >= 1e6).map(([cause, bytes]) => [cause, gb(bytes)]);
  return el("section", { class: "two" }, el("div", {}, el("h2", {}, "Plan"), el("dl", { class: "facts" }, [["Device", found.device], ["Memory", `${gb(found.peak)} of ${gb(found.memory)}`], ["Fits", found.fits ? "yes" : "no"], ["A step", `${duration(plan.step_seconds)}${found.at_least ? " at least" : ""}`], ["All steps", plan.total_steps ? duration(plan.total_steps * plan.step_seconds) : "–"],
    ["Store", `${gb(Object.values(plan.store_per_1000).reduce((a, b) => a + b, 0))} for 1,000 figures`], ["A checkpoint", gb(plan.checkpoint)], ["Free on disk", gb(found.disk)]].map(([title, value]) => el("div", {}, el("dt", {}, title), el("dd", { class: title === "Fits" ? (found.fits ? "better" : "worse") : "" }, value)))),
    found.changes.length ? el("p", {}, `It fits with: ${found.changes.join("; ")}`) : "", el("p", { class: "soft" }, found.note)), el("div", {}, el("h3", {}, "Memory while training"), table(["cause", ""], memory)));
}
