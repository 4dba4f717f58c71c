// One figure large: beside it the picture that its latents are, or the pictures that an edit began with; its caption, to be edited.
import { button, dialog, el, get, link, query, say } from "/static/dom.js";
export async function showFigure(source, row, edits, marked) {
  const found = await get("/api/data/figure", { source, row }), picture = (which, title) => {
    const image = el("img", { class: "shot", alt: title, src: `/api/data/picture?${query({ source, row, which, size: "whole", v: found.changed })}` }), note = el("p", { class: "soft" }, title);
    image.addEventListener("error", async () => { const said = await fetch(image.src).then((answer) => answer.json()).catch(() => ({})); note.textContent = `${title}: ${said.error ?? "it cannot be shown"}`; note.className = "bad"; image.remove(); });
    return el("div", {}, note, image);
  };
  const pictures = found.reason ? [] : found.store ? [found.original ? picture("figure", "The figure") : null, picture("latent", "Its latents, decoded")] : [picture("figure", "The figure"), ...Array.from({ length: found.made_of }, (_, i) => picture(`source${i}`, `Made from, ${i + 1}`))];
  const text = el("textarea", { id: "caption", value: edits.get(found.id) ?? found.caption, rows: 6, readOnly: found.store });
  dialog(found.id, el("div", { class: "two" }, pictures.filter(Boolean)), found.reason ? el("p", { class: "bad" }, `Left out: ${found.reason}`) : el("div", {}, el("label", { htmlFor: "caption" }, found.captions > 1 ? `Caption, the first of ${found.captions}` : "Caption"), text,
    el("p", { class: "soft" }, [found.bucket, found.tier, found.kind, `${found.length} characters`, found.place].filter(Boolean).join(" · ")),
    found.store ? "" : el("div", { class: "tools" }, button("Keep the edited caption", async () => {
      if (!text.value.trim()) throw new Error("A caption cannot be empty.");
      if (text.value.trim() === found.caption) edits.delete(found.id); else edits.set(found.id, text.value.trim());
      marked();
      document.querySelector("#dialog").close();
      say("Kept on this page. Save it as a new revision when you are done.");
    }), found.place ? el("a", { href: link("Playground", "edit", found.place) }, "Edit the picture") : "")));
}
