// A grid of any number of figures: only the cells in sight exist, and only the rows in sight are asked for.
import { el, get, number, query } from "/static/dom.js";
const WIDTH = 180, HEIGHT = 206, PIECE = 120, KEPT = 40, LIMIT = 15e6; // px of a cell; rows asked for at once; pieces kept; px of an element
export class Grid {
  constructor(source, onTotal, onOpen) {
    Object.assign(this, { source, onTotal, onOpen, wanted: {}, total: 0, pieces: new Map(), cells: new Map(), turn: 0, at: 0 });
    this.tall = el("div", { class: "tall" });
    this.element = el("div", { class: "grid-figures", role: "group", tabIndex: -1, "aria-label": "Figures" }, this.tall);
    this.element.addEventListener("scroll", () => this.later(), { passive: true });
    this.element.addEventListener("keydown", (event) => this.key(event));
    this.watch = new ResizeObserver(() => this.layout());
    this.watch.observe(this.element);
  }
  end() { this.watch.disconnect(); }
  async filter(wanted) {
    const mine = ++this.turn;
    this.wanted = wanted;
    const first = await get("/api/data/rows", { source: this.source, ...wanted, first: 0, count: PIECE });
    if (mine !== this.turn) return;
    this.pieces = new Map([[0, first.rows]]);
    this.total = first.total;
    this.at = 0;
    for (const cell of this.cells.values()) cell.remove();
    this.cells.clear();
    this.element.scrollTop = 0;
    this.onTotal(this.total);
    this.layout();
  }
  layout() {
    this.columns = Math.max(1, Math.floor(this.element.clientWidth / WIDTH));
    this.cell = this.element.clientWidth / this.columns;
    this.full = Math.ceil(this.total / this.columns) * HEIGHT;
    this.scale = Math.max(1, this.full / LIMIT); // beyond what an element may be high, the bar moves further than the cells
    this.tall.style.height = `${this.full / this.scale}px`;
    for (const cell of this.cells.values()) cell.remove();
    this.cells.clear();
    this.draw();
  }
  later() { if (!this.waits) { this.waits = true; requestAnimationFrame(() => { this.waits = false; this.draw(); }); } }
  top() { const e = this.element, most = e.scrollHeight - e.clientHeight; return this.scale === 1 || most <= 0 ? e.scrollTop : e.scrollTop / most * (this.full - e.clientHeight); }
  draw() {
    const top = this.top(), offset = this.element.scrollTop - top, first = Math.max(0, Math.floor(top / HEIGHT) - 1) * this.columns, last = Math.min(this.total, (Math.ceil((top + this.element.clientHeight) / HEIGHT) + 1) * this.columns);
    for (const [index, cell] of this.cells) if (index < first || index >= last) { cell.remove(); this.cells.delete(index); }
    for (let index = first; index < last; index++) {
      let cell = this.cells.get(index);
      const row = this.row(index);
      if (!cell || (row && !cell.dataset.row)) {
        const focused = cell !== undefined && cell === document.activeElement; // its row has come: the focus goes over
        cell?.remove();
        cell = this.make(index, row);
        this.cells.set(index, cell);
        this.tall.append(cell);
        if (focused) cell.focus({ preventScroll: true });
      }
      cell.style.transform = `translate(${index % this.columns * this.cell}px, ${Math.floor(index / this.columns) * HEIGHT + offset}px)`;
    }
  }
  row(index) {
    const piece = Math.floor(index / PIECE), rows = this.pieces.get(piece);
    if (rows) return rows[index - piece * PIECE];
    if (rows === undefined) this.ask(piece);
    return undefined;
  }
  async ask(piece) {
    const mine = this.turn;
    this.pieces.set(piece, null);
    await new Promise((done) => setTimeout(done, 60)); // who scrolls past needs no rows
    if (mine !== this.turn) return;
    const seen = Math.floor(this.top() / HEIGHT) * this.columns;
    if (Math.abs(piece * PIECE - seen) > 4 * PIECE) { this.pieces.delete(piece); return; }
    const { rows } = await get("/api/data/rows", { source: this.source, ...this.wanted, first: piece * PIECE, count: PIECE });
    if (mine !== this.turn) return;
    this.pieces.set(piece, rows);
    for (const old of this.pieces.keys()) if (this.pieces.size > KEPT && old !== piece) this.pieces.delete(old);
    this.draw();
  }
  make(index, row) {
    const cell = el("button", { type: "button", class: `cell${row?.reason ? " out" : ""}`, tabIndex: index === this.at ? 0 : -1, "aria-label": row ? (row.reason || row.caption || row.id) : `figure ${number(index + 1)}` });
    cell.style.width = `${this.cell}px`;
    cell.style.height = `${HEIGHT}px`;
    if (!row) { cell.append(el("div", { class: "pic none" })); return cell; }
    cell.dataset.row = row.row;
    cell.append(row.reason ? el("div", { class: "pic none" }) : el("img", { class: "pic", alt: "", decoding: "async", src: `/api/data/picture?${query({ source: this.source, row: row.row, v: row.changed })}` }), el("span", { title: row.id }, row.reason ? `${row.id}: ${row.reason}` : row.caption));
    cell.addEventListener("click", () => { this.focus(index); this.onOpen(row.row); });
    return cell;
  }
  focus(index) {
    this.cells.get(this.at)?.setAttribute("tabindex", -1);
    this.at = Math.max(0, Math.min(this.total - 1, index));
    const y = Math.floor(this.at / this.columns) * HEIGHT, top = this.top(), high = this.element.clientHeight;
    if (y < top) this.element.scrollTop = y / this.scale;
    else if (y + HEIGHT > top + high) this.element.scrollTop = (y + HEIGHT - high) / this.scale;
    this.draw();
    const cell = this.cells.get(this.at);
    cell?.setAttribute("tabindex", 0);
    cell?.focus({ preventScroll: true });
  }
  key(event) {
    const page = Math.max(1, Math.floor(this.element.clientHeight / HEIGHT)) * this.columns;
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: this.columns, ArrowUp: -this.columns, PageDown: page, PageUp: -page, Home: -this.total, End: this.total }[event.key];
    if (step === undefined || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    this.focus(this.at + step);
  }
}
