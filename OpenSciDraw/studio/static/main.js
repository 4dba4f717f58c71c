import { el, get, link, say } from "/static/dom.js";
const main = document.querySelector("#content"), tabs = document.querySelector("#tabs"), dialog = document.querySelector("#dialog");
const { folder, pages } = await get("/api/pages");
document.querySelector("#folder").textContent = folder;
tabs.append(...pages.map((page) => el("li", {}, el("a", { href: link(page.title) }, page.title))));
document.querySelector("#dialog-close").addEventListener("click", () => dialog.close());
dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
let leave = () => {}, turn = 0;
// The address after # is the page and what it shows: a page is a module with show(main, path), which may return what ends it.
async function show() {
  const mine = ++turn, path = location.hash.slice(1).split("/").map(decodeURIComponent);
  const page = pages.find((one) => one.title === path[0]) ?? pages[0];
  leave();
  leave = () => {};
  if (dialog.open) dialog.close();
  for (const a of tabs.querySelectorAll("a")) a.textContent === page.title ? a.setAttribute("aria-current", "page") : a.removeAttribute("aria-current");
  document.title = `${page.title} – ScienceFlow studio`;
  const place = el("div");
  main.replaceChildren(place);
  try {
    const module = await import(`/static/${page.script}`), end = await module.show(place, path.slice(1));
    if (mine === turn) leave = end ?? leave; else end?.();
  } catch (error) {
    place.append(el("p", { class: "problems" }, error.message));
  }
}
addEventListener("hashchange", show);
addEventListener("unhandledrejection", (event) => say(event.reason?.message ?? String(event.reason), true));
show();
