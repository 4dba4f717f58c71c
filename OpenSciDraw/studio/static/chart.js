// Line charts in the look of the report (reporting/charts.py), drawn here because their lines grow.
import { el, number, svg } from "/static/dom.js";
const W = 560, H = 300, L = 72, R = 28, T = 14, B = 42;
function ticks(low, high, most = 7) {
  if (!(high > low)) return [low];
  const base = 10 ** Math.floor(Math.log10((high - low) / most)), step = [1, 2, 5, 10, 20].map((k) => k * base).find((s) => (high - low) / s <= most);
  return Array.from({ length: Math.floor(high / step + 1e-9) - Math.ceil(low / step - 1e-9) + 1 }, (_, i) => Number(((Math.ceil(low / step - 1e-9) + i) * step).toPrecision(12)));
}
// lines: [{ name, points: [[step, value], …], faint }]; null where there is nothing to draw.
export function chart(title, lines, { y = "", log = false } = {}) {
  const drawn = lines.filter((line) => line.points.length);
  if (!drawn.length) return null;
  let [x0, x1, y0, y1] = [Infinity, -Infinity, Infinity, -Infinity];
  for (const line of drawn) for (const [x, v] of line.points) { x0 = Math.min(x0, x); x1 = Math.max(x1, x); y0 = Math.min(y0, v); y1 = Math.max(y1, v); }
  log = log && y0 > 0 && y1 > 10 * y0;
  const level = (v) => log ? Math.log10(v) : v;
  let low = level(y0), high = level(y1);
  const pad = (high - low || Math.abs(high) || 1) * 0.05;
  low -= pad; high += pad; x1 = Math.max(x1, x0 + 1);
  const px = (x) => L + (x - x0) / (x1 - x0) * (W - L - R), py = (v) => H - B - (level(v) - low) / (high - low) * (H - T - B);
  const lastOf = drawn.filter((line) => !line.faint).map((line) => `${line.name} ${number(line.points.at(-1)[1])}`).join(", ");
  const root = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `${title}: at step ${number(x1)} ${lastOf}` });
  let marks = log ? Array.from({ length: Math.floor(high) - Math.ceil(low) + 1 }, (_, i) => 10 ** (Math.ceil(low) + i)) : ticks(low, high);
  if (log && marks.length < 2) marks = ticks(10 ** low, 10 ** high).filter((v) => v > 0);
  for (const v of marks) root.append(svg("line", { class: "grid", x1: L, x2: W - R, y1: py(v), y2: py(v) }), svg("text", { class: "tick", x: L - 6, y: py(v) + 4, "text-anchor": "end" }, number(v)));
  for (const x of ticks(x0, x1)) root.append(svg("text", { class: "tick", x: px(x), y: H - B + 17, "text-anchor": "middle" }, number(x)));
  root.append(svg("line", { class: "axis", x1: L, x2: W - R, y1: H - B, y2: H - B }), svg("text", { class: "name", x: (W + L) / 2, y: H - 6, "text-anchor": "middle" }, "step"),
    svg("text", { class: "name", transform: `translate(13 ${(T + H - B) / 2}) rotate(-90)`, "text-anchor": "middle" }, y + (log ? " (log)" : "")));
  const legend = el("ul", { class: "legend" });
  drawn.forEach((line, i) => {
    const at = line.colour ?? i, kind = `c${at % 8}${line.faint ? " faint" : ""}${at >= 8 ? " again" : ""}`;
    root.append(line.points.length === 1 ? svg("circle", { class: `dot ${kind}`, cx: px(line.points[0][0]), cy: py(line.points[0][1]), r: 3.5 })
      : svg("polyline", { class: `line ${kind}`, points: line.points.map(([x, v]) => `${px(x).toFixed(1)},${py(v).toFixed(1)}`).join(" ") }));
    if (drawn.length > 1) legend.append(el("li", {}, el("span", { class: `key ${kind}` }), line.name));
  });
  const tip = el("div", { class: "tip", hidden: true }), rule = svg("line", { class: "pointer", y1: T, y2: H - B });
  const figure = el("figure", { class: "chart" }, el("figcaption", {}, title), root, legend, tip);
  root.addEventListener("pointerleave", () => { tip.hidden = true; rule.remove(); });
  root.addEventListener("pointermove", (event) => {
    const box = root.getBoundingClientRect(), x = x0 + ((event.clientX - box.left) / box.width * W - L) / (W - L - R) * (x1 - x0);
    const near = drawn.map((line) => line.points.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a));
    const first = near.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a);
    rule.setAttribute("x1", px(first[0]));
    rule.setAttribute("x2", px(first[0]));
    root.append(rule);
    tip.replaceChildren(el("div", {}, `step ${number(first[0])}`), ...drawn.map((line, i) => near[i][0] === first[0] && !line.faint ? el("div", {}, `${line.name}: ${number(near[i][1])}`) : ""));
    tip.hidden = false;
    const left = event.clientX - figure.getBoundingClientRect().left;
    tip.style.left = `${Math.max(4, Math.min(left + 14, figure.clientWidth - tip.offsetWidth - 4))}px`;
    tip.style.top = "44px";
  });
  return figure;
}
