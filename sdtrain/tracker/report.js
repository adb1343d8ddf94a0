"use strict";
// The sample sliders.
for (const gallery of document.querySelectorAll(".gallery")) {
  const pictures = [...gallery.querySelectorAll("img")];
  const slider = gallery.querySelector("input");
  if (!slider) continue;
  slider.addEventListener("input", () => {
    pictures.forEach((picture, index) => { picture.hidden = index !== Number(slider.value); });
    gallery.querySelector("output").textContent = "step " + pictures[slider.value].dataset.step;
  });
}
// The charts' cursor: the values at the step under the pointer.
for (const chart of document.querySelectorAll(".chart")) {
  const svg = chart.querySelector("svg"), cursor = chart.querySelector(".cursor"), output = chart.querySelector("output");
  const low = Number(chart.dataset.low), high = Number(chart.dataset.high), series = JSON.parse(chart.dataset.series);
  const view = svg.viewBox.baseVal, left = PLOT_LEFT, right = view.width - PLOT_RIGHT;
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = Math.min(Math.max((event.clientX - box.left) / box.width * view.width, left), right);
    const step = low + (x - left) / (right - left) * (high - low);
    const nearest = series.map((line) => line.points.reduce((a, b) => Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a));
    const values = nearest.map((point, i) => (series.length > 1 ? series[i].name + " " : "") + point[1]);
    output.textContent = "step " + nearest[0][0] + ": " + values.join(", ");
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    cursor.style.visibility = "visible";
  });
  svg.addEventListener("pointerleave", () => { cursor.style.visibility = "hidden"; output.textContent = ""; });
}
