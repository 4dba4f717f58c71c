// A new run: a config to start from, its keys in a form made from the schema, checked by the loader of the command line.
import { button, el, field, get, link, post, say, table } from "/static/dom.js";
import { planOf } from "/static/plan.js";
const FIRST = ["run_name", "encode.figures", "encode.resolution", "pretrained_model_name_or_path", "rank", "lora_alpha", "learning_rate", "optimizer", "train_batch_size", "gradient_accumulation_steps", "max_train_steps", "validation_prompts", "validation_steps", "checkpointing_steps", "mixed_precision", "model_output_dir"];
export async function showForm(main, given) {
  const [{ recipes, saved }, schema] = [await get("/api/configs"), await get("/api/configs/schema")];
  const [base, source] = given.startsWith("figures:") ? ["", given.slice(8)] : [given, ""];
  const start = el("select", { id: "base" }, el("optgroup", { label: "Recipes" }, recipes.map((one) => el("option", { value: one.base }, one.title))), saved.length ? el("optgroup", { label: "Configs here" }, saved.map((one) => el("option", { value: one.base }, one.title))) : "");
  if (base) start.value = base;
  const other = el("select", { id: "other" }, el("option", { value: "" }, "nothing"), saved.map((one) => el("option", { value: one.base }, one.title)));
  const name = el("input", { type: "text", id: "name", required: true, pattern: "[A-Za-z0-9][A-Za-z0-9_-]*", placeholder: "my-first-run" });
  const figures = el("input", { type: "text", id: "figures", value: source, placeholder: "folder of figures, as the page Data names it" });
  const search = el("input", { type: "search", id: "search", placeholder: "key or meaning" }), form = el("div"), problems = el("p", { class: "problems", role: "alert" }), plan = el("div"), difference = el("div");
  let values = {}, changes = {}, timer, turn = 0;
  const check = async () => {
    const mine = ++turn, said = await post("/api/configs/check", { base: start.value, changes });
    if (mine === turn) problems.textContent = said.problems.join("\n");
    return !said.problems.length;
  };
  const later = () => { clearTimeout(timer); timer = setTimeout(() => check().catch((error) => say(error.message, true)), 350); };
  const change = (key, text, item) => {
    if (text === values[key]) delete changes[key]; else changes[key] = text;
    item?.classList.toggle("changed", key in changes);
    later();
  };
  const input = (key) => {
    const value = changes[key.name] ?? values[key.name] ?? "", id = `key-${key.name}`;
    const made = key.choices.length ? el("select", { id }, [...new Set([...key.choices, value])].map((choice) => el("option", { value: choice, selected: choice === value }, choice))) : el("input", { type: "text", id, value, autocomplete: "off", spellcheck: false });
    const item = el("div", { class: `item${key.name in changes ? " changed" : ""}` }, el("label", { htmlFor: id }, el("code", {}, key.name), key.unit ? ` (${key.unit})` : ""), made, el("p", { class: "soft" }, key.meaning), el("p", { class: "soft mono" }, `${key.type}${key.default === null ? ", required" : `, default ${key.default === "" ? "''" : key.default}`}`));
    made.setAttribute("aria-describedby", "problems");
    made.addEventListener("input", () => change(key.name, made.value, item));
    return item;
  };
  const draw = () => {
    const wanted = search.value.trim().toLowerCase(), match = (key) => `${key.name} ${key.meaning}`.toLowerCase().includes(wanted), by = new Map(schema.map((key) => [key.name, key]));
    if (wanted) { form.replaceChildren(el("div", { class: "form" }, schema.filter(match).map(input))); return; }
    const names = [...new Set(schema.map((key) => key.group))];
    form.replaceChildren(el("div", { class: "form" }, FIRST.map((key) => by.get(key)).filter(Boolean).map(input)), ...names.map((group) => {
      const body = el("div", { class: "form" }), part = el("details", { ontoggle: () => { if (part.open && !body.children.length) body.append(...schema.filter((key) => key.group === group && !FIRST.includes(key.name)).map(input)); } }, el("summary", {}, group), body);
      return part;
    }));
  };
  const load = async () => {
    values = await get("/api/configs/values", { base: start.value });
    changes = {};
    await named();
  };
  const named = async () => {
    if (name.value && figures.value) {
      try {
        const found = await get("/api/configs/for_figures", { name: name.value, source: figures.value });
        for (const [key, text] of Object.entries(found)) change(key, text);
      } catch (error) { problems.textContent = error.message; return; }
    } else if (name.value) for (const [key, text] of Object.entries(await get("/api/configs/for_run", { name: name.value }))) change(key, text);
    draw();
    later();
  };
  const save = async () => {
    if (!name.value) { name.focus(); throw new Error("Give the run a name first."); }
    if (!await check()) { problems.scrollIntoView({ block: "center" }); throw new Error("Mend what is listed above the form first."); }
    return (await post("/api/configs/save", { name: name.value, base: start.value, changes })).config;
  };
  problems.id = "problems";
  start.addEventListener("change", load);
  for (const one of [name, figures]) one.addEventListener("change", () => named().catch((error) => say(error.message, true)));
  search.addEventListener("input", draw);
  main.append(el("p", {}, el("a", { href: link("Queue") }, "Queue")), el("h1", {}, "New run"), el("div", { class: "tools" }, field("Start from", start, "grow"), field("Name", name), field("Figures", figures, "grow")),
    el("div", { class: "tools" }, button("Start", async () => { const config = await save(), { jobs } = await post("/api/configs/start", { config }); say(`Queued: job ${jobs.join(", then ")}.`); location.hash = link("Queue"); }, "main"),
      button("Save the config", async () => say(`Saved: ${await save()}`)), button("Plan", async () => { plan.replaceChildren(el("p", { class: "soft" }, "Counting one step of each size …")); try { plan.replaceChildren(await planOf(start.value, changes)); } catch (error) { plan.replaceChildren(el("p", { class: "problems" }, error.message)); } })),
    problems, plan, el("div", { class: "tools" }, field("Find a key", search, "grow"), field("Compare with", other)), difference, form);
  other.addEventListener("change", async () => {
    if (!other.value) { difference.replaceChildren(); return; }
    const rows = await get("/api/configs/diff", { one: start.value, other: other.value });
    difference.replaceChildren(table(["key", "here", other.value], rows.map((row) => [el("code", {}, row.key), changes[row.key] ?? row.one ?? "–", row.other ?? "–"]), "wide-table"));
  });
  await load();
  name.focus();
}
