// A drawn picture as a figure that can be edited: three files, and how much of the picture they explain.
import { el, post, query } from "/static/dom.js";
const TITLES = { svg: "SVG", tikz: "TikZ", pptx: "PPTX" };
export async function showEditable(place, image) {
  place.replaceChildren(el("p", { class: "soft" }, "Reading …"));
  try {
    const found = await post("/api/editable/make", { image });
    place.replaceChildren(el("p", { class: "soft" }, found.says, found.ocr ? "" : ". No OCR is installed: only letters of the drawing font are read."), el("div", { class: "tools" }, found.formats.map((format) => el("a", { class: "act", href: `/api/editable/get?${query({ id: found.id, format })}`, download: "" }, TITLES[format]))));
  } catch (error) {
    place.replaceChildren(el("p", { class: "problems" }, error.message));
  }
}
